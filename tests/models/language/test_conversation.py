"""Conversations: a question is one of a single turn, and a loss that of each answer behind its true history."""

import pytest
import torch

from lavis_kvmod.models.language.conversation import conversation_ids

PROMPT = "Question: {} Short answer:"
FIRST = ("which digit is written", "seven")
SECOND = ("what colour is the ink", "red")


def vqa(image, question, answer, **more):
    return {
        "image": image,
        "text_input": [question],
        "answer": [answer],
        "n_answers": torch.tensor([1]),
        "weight": torch.ones(1),
        "prompt": PROMPT,
        **more,
    }


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_question_is_a_conversation_of_one_turn(build, images):
    model, image = build().eval(), images(1)
    alone = vqa(image, *FIRST)
    marked = {**alone, "text_input": ["<image> " + FIRST[0]], "history": [[]]}
    whole = {"image": image, "prompt": PROMPT, "turns": [[FIRST]]}
    losses = [model(batch) for batch in (alone, {**alone, "history": [[]]}, marked, whole)]
    for other in losses[1:]:
        close(other["loss"], losses[0]["loss"])
        assert other["loss_weight"] == losses[0]["loss_weight"]
    search = dict(num_beams=3, max_len=6, return_scores=True)
    (expected,), (found,) = (model.predict_answers(batch, prompt=PROMPT, **search) for batch in (alone, marked))
    assert found.answer == expected.answer and found.log_prob == pytest.approx(expected.log_prob, abs=1e-5)
    candidates = ["red", "seven", "yes"]
    ranked = [
        model.predict_answers(b, inference_method="rank", answer_list=candidates, return_scores=True)[0]
        for b in (alone, marked)
    ]
    assert ranked[0].answer == ranked[1].answer and ranked[0].log_prob == pytest.approx(ranked[1].log_prob, abs=1e-5)


def test_all_answers_of_a_conversation_are_learnt_as_each_behind_its_history(build, images):
    """And the gradients are the same, of one pass instead of one for each answer."""
    model, image = build().eval(), images(2)
    whole = {"image": image, "prompt": PROMPT, "turns": [[FIRST, SECOND], [SECOND]]}
    apart = [
        vqa(image[:1], *FIRST, history=[[]]),
        vqa(image[:1], *SECOND, history=[[FIRST]]),
        vqa(image[1:], *SECOND, history=[[]]),
    ]
    found = model(whole)
    each = [model(batch) for batch in apart]
    weights = torch.stack([one["loss_weight"] for one in each])
    assert found["loss_weight"] == weights.sum()
    close(found["loss"], (torch.stack([one["loss"] for one in each]) * weights).sum() / weights.sum())
    found["loss"].backward()
    gradient = model.opt_proj.weight.grad.clone()
    model.zero_grad()
    sum(one["loss"] * one["loss_weight"] / weights.sum() for one in each).backward()
    close(model.opt_proj.weight.grad, gradient)


def test_no_question_is_learnt(build):
    laid_out = conversation_ids(build().opt_tokenizer, [FIRST, SECOND], PROMPT, 32, [[-1, -2]])
    tokenizer = build().opt_tokenizer
    learnt = [label for label in laid_out.labels if label != -100]
    assert tokenizer.decode(learnt) == " seven\n red\n" and len(laid_out.ids) == len(laid_out.labels)
    said = tokenizer.decode([token for token in laid_out.ids if token >= 0], skip_special_tokens=True)
    history = "Question: which digit is written Short answer: seven\n"
    assert said == history + "Question: what colour is the ink Short answer: red\n"


def test_images_stand_where_the_text_has_them(build, images):
    model, two = build().eval(), images(2).unsqueeze(0)  # (1, 2, 3, H, W)
    turns = [("<image> which digit is written", "seven"), ("and in <image> now", "red")]
    batch = {"image": two, "prompt": PROMPT, "turns": [turns]}
    swapped = {**batch, "image": two.flip(1)}
    assert abs(model(batch)["loss"] - model(swapped)["loss"]) > 1e-4
    # What was said before an image cannot know of it.
    other = torch.cat([two[:, :1], torch.zeros_like(two[:, :1])], dim=1)
    ids = model._laid_out(batch, [turns], PROMPT)[0].ids
    q = model.num_soft_prompt
    assert ids[:q] == list(range(-1, -1 - q, -1)) and ids.count(-1 - q) == 1 and ids.index(-1 - q) > q
    hidden = []
    for image in (two, other):
        text = model._told({**batch, "image": image})
        soft_prompt = model.soft_prompts({**batch, "image": image})
        hidden.append(model.token_losses(soft_prompt, text)[1])
    answered = len(model.opt_tokenizer(" seven\n", add_special_tokens=False).input_ids)
    close(hidden[0][:answered], hidden[1][:answered])
    assert (hidden[0][answered:] - hidden[1][answered:]).abs().max() > 1e-5


def test_a_conversation_without_images_is_read_by_the_language_model_alone(build, images):
    """Beside others, or in a batch without any image, whose gradients are then zero, not missing."""
    model, one = build().eval(), images(1)
    turns = [FIRST, SECOND]
    none = {"image": one.new_zeros(1, 0, *one.shape[1:]), "prompt": PROMPT, "turns": [turns]}
    found = model(none)
    laid_out = conversation_ids(model.opt_tokenizer, turns, PROMPT, 32, [])
    assert min(laid_out.ids) >= 0
    logits = model.opt_model(input_ids=torch.tensor([laid_out.ids])).logits[0, :-1]
    # The answers' closing newlines among them: labels stand where their token does.
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(laid_out.labels[1:]))
    close(found["loss"], expected)
    found["loss"].backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.opt_proj.parameters())
    mixed = {
        "image": torch.stack([one, one]),
        "image_mask": torch.tensor([[False], [True]]),
        "prompt": PROMPT,
        "turns": [turns, [FIRST]],
    }
    with_image = model({"image": one, "prompt": PROMPT, "turns": [[FIRST]]})
    both = model(mixed)
    parts = [(each["loss"] * each["loss_weight"]) for each in (found, with_image)]
    close(both["loss"] * both["loss_weight"], sum(parts))
    search = dict(num_beams=2, max_len=5, prompt=PROMPT, return_scores=True)
    ask = {"text_input": [SECOND[0]] * 2, "history": [[FIRST], [FIRST]]}
    first, second = model.predict_answers({**mixed, **ask}, **search)
    (alone,) = model.predict_answers({**none, "text_input": [SECOND[0]], "history": [[FIRST]]}, **search)
    assert first.answer == alone.answer and first.log_prob == pytest.approx(alone.log_prob, abs=1e-4)


def test_what_others_of_a_batch_are_like_changes_nothing(build, images):
    """Images shared by samples, other numbers of them, longer histories beside."""
    model, three = build().eval(), images(3)
    both = {
        "image": torch.stack([three[:2], three[1:]]),
        "image_mask": torch.tensor([[True, False], [True, True]]),
        "image_index": torch.tensor([0, 1, 0]),
        "history": [[], [("<image><image> which digit is written", "seven")], [FIRST]],
        "text_input": [FIRST[0], SECOND[0], SECOND[0]],
    }
    alone = [
        {"image": three[:1], "history": [[]], "text_input": [FIRST[0]]},
        {"image": three[None, 1:], "history": both["history"][1:2], "text_input": [SECOND[0]]},
        {"image": three[:1], "history": [[FIRST]], "text_input": [SECOND[0]]},
    ]
    search = dict(num_beams=2, max_len=5, prompt=PROMPT, return_scores=True)
    together = model.predict_answers(both, **search)
    for one, batch in zip(together, alone):
        (expected,) = model.predict_answers(batch, **search)
        assert one.answer == expected.answer and one.log_prob == pytest.approx(expected.log_prob, abs=1e-4)


def test_a_prompt_is_continued_behind_a_history(build, images):
    model, image = build(prompt=PROMPT).eval(), images(1)
    search = dict(num_beams=1, max_length=5)
    plain = model.generate({"image": image, "prompt": "a photo of"}, **search)
    assert model.generate({"image": image, "prompt": "a photo of", "history": [[]]}, **search) == plain
    asked = f"{FIRST[0]}"
    behind = {"image": image, "history": [[FIRST]], "prompt": f"Question: {asked} Short answer:"}
    answer = model.predict_answers(
        {"image": image, "history": [[FIRST]], "text_input": [asked]}, num_beams=1, max_len=5, min_len=0
    )
    assert model.generate(behind, **search) == answer


@pytest.mark.parametrize(
    "turns, told",
    [
        ([("<image> and <image>", "no")], "got 2 marks and 1 images"),
        ([("<image> ", "no")], "empty question"),
        ([("what is it", " ")], "the answer to 'what is it' is empty"),
    ],
)
def test_what_cannot_be_laid_out_is_told(build, images, turns, told):
    with pytest.raises(ValueError, match=told):
        build()({"image": images(1), "prompt": PROMPT, "turns": [turns]})


def test_gated_layers_have_no_place_in_a_text(build, images):
    model = build(fusion="gated_cross_attention", gated_every=1, connector="linear", aux_fusion="prefix")
    with pytest.raises(ValueError, match="model.fusion: gated_cross_attention: a conversation's images have no place"):
        model({"image": images(1), "turns": [[FIRST]]})
