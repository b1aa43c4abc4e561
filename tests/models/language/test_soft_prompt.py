"""Confidence of generated answers, and ranking."""

import pytest
import torch

from lavis_kvmod.models.language.decoding import Search
from lavis_kvmod.models.language.log_probs import answer_log_probs
from lavis_kvmod.models.language.soft_prompt import ROWS_AT_ONCE, continue_texts, rank_answers
from lavis_kvmod.models.language.text import answer_ids

PROMPT = "Question: {} Short answer:"
CANDIDATES = ["seven", "one", "red", "a cat on a mat", "yes", "no", "blue and red"]


def asked(images, b=3):
    return {"image": images(b), "text_input": ["which digit", "what colour is the ink of it", "is it even"][:b]}


def log_probability(model, sample, answer):
    """One answer's log-probability, token by token through the model's own loss."""
    with torch.no_grad():
        out = model({**sample, "answer": [answer], "weight": torch.ones(1), "n_answers": torch.ones(1).long()})
    return -(out["loss"] * out["loss_weight"]).item()


def one(batch, i):
    return {"image": batch["image"][i : i + 1], "text_input": batch["text_input"][i : i + 1], "prompt": PROMPT}


@pytest.mark.parametrize("rows_at_once", [ROWS_AT_ONCE, 4, 1])
def test_ranking_takes_the_likeliest_answer(build, images, rows_at_once):
    """The same answer and log-probability as running every candidate behind every question."""
    model, batch = build().eval(), asked(images)
    with torch.no_grad():
        ranked = rank_answers(
            model.opt_model,
            model.opt_tokenizer,
            model.encode(batch).soft_prompt,
            model._question_contexts(batch, PROMPT),
            CANDIDATES,
            len(CANDIDATES),
            rows_at_once,
        )
    for i, got in enumerate(ranked):
        each = {answer: log_probability(model, one(batch, i), answer) for answer in CANDIDATES}
        best = max(each, key=each.get)
        assert got.answer == best
        assert got.log_prob == pytest.approx(each[best], abs=1e-4)
        assert got.num_tokens == len(answer_ids(model.opt_tokenizer, best))
    assert model.predict_answers(batch, inference_method="rank", answer_list=CANDIDATES, prompt=PROMPT) == [
        answer.answer for answer in ranked
    ]


def test_image_and_question_go_through_opt_once(build, images):
    model, batch = build().eval(), asked(images)
    lengths = []
    model.opt_model.model.decoder.layers[0].register_forward_hook(
        lambda _, args, kwargs, out: lengths.append(args[0].shape[:2]), with_kwargs=True
    )
    model.predict_answers(batch, inference_method="rank", answer_list=CANDIDATES, prompt=PROMPT)
    contexts = model._question_contexts(batch, PROMPT)
    longest_answer = max(len(answer_ids(model.opt_tokenizer, answer)) for answer in CANDIDATES)
    assert lengths == [(3, 5 + max(map(len, contexts))), (3 * len(CANDIDATES), longest_answer)]


def test_few_candidates_are_chosen_by_their_first_token(build, images):
    model, batch = build().eval(), asked(images, b=1)
    got = model.predict_answers(
        batch, inference_method="rank", answer_list=CANDIDATES, num_ans_candidates=2, prompt=PROMPT
    )
    first = {}
    for answer in CANDIDATES:
        tokens = answer_ids(model.opt_tokenizer, answer)[:1]
        text = model.opt_tokenizer.decode(tokens)
        first.setdefault(text, []).append(answer)
    with torch.no_grad():
        context = model._question_contexts(batch, PROMPT)[0]
        embedded = model.opt_model.get_input_embeddings()(torch.tensor([context]))
        inputs = torch.cat([model.encode(batch).soft_prompt, embedded], dim=1)
        logits = model.opt_model.lm_head(model.opt_model.model.decoder(inputs_embeds=inputs).last_hidden_state[:, -1])
    by_first = sorted(CANDIDATES, key=lambda answer: -logits[0, answer_ids(model.opt_tokenizer, answer)[0]].item())
    likeliest = max(by_first[:2], key=lambda answer: log_probability(model, one(batch, 0), answer))
    assert got == [likeliest]


def test_ranking_needs_candidates(build, images):
    model, batch = build().eval(), asked(images)
    with pytest.raises(ValueError, match="'rank' needs candidates: give answer_list"):
        model.predict_answers(batch, inference_method="rank")
    with pytest.raises(ValueError, match="candidate 1 is empty"):
        model.predict_answers(batch, inference_method="rank", answer_list=["yes", " "])
    with pytest.raises(ValueError, match="inference_method: expected one of .*got 'guess'"):
        model.predict_answers(batch, inference_method="guess")


@pytest.mark.parametrize("num_beams", [1, 3])
def test_confidence_of_a_generated_answer(build, images, num_beams):
    """The sum over the generated tokens, each behind all before it; texts as without scores."""
    model, batch = build().eval(), asked(images)
    settings = dict(num_beams=num_beams, length_penalty=0.0)
    scored = model.predict_answers(batch, prompt=PROMPT, max_len=12, return_scores=True, **settings)
    assert [answer.answer for answer in scored] == model.predict_answers(batch, prompt=PROMPT, max_len=12, **settings)

    contexts = model._question_contexts(batch, PROMPT)
    with torch.no_grad():
        soft_prompt = model.encode(batch).soft_prompt
        search = Search(max_new_tokens=12, min_new_tokens=1, **settings)
        generated = continue_texts(
            model.opt_model, model.opt_tokenizer, soft_prompt, contexts, search, stop=model.eos_token_id
        )
        for i, (context, (added, _)) in enumerate(zip(contexts, generated)):
            embedded = model.opt_model.get_input_embeddings()(torch.tensor([context + added]))
            inputs = torch.cat([soft_prompt[i : i + 1], embedded], dim=1)
            hidden = model.opt_model.model.decoder(inputs_embeds=inputs).last_hidden_state[0, -len(added) - 1 : -1]
            each = model.opt_model.lm_head(hidden).log_softmax(-1)[range(len(added)), added]
            assert scored[i].num_tokens == len(added)
            assert scored[i].log_prob == pytest.approx(each.sum().item(), abs=1e-4)
            assert scored[i].mean_log_prob == pytest.approx(each.mean().item(), abs=1e-4)


def test_confidence_of_several_captions(build, images):
    model = build().eval()
    torch.manual_seed(0)
    sampling = dict(use_nucleus_sampling=True, num_captions=3, max_length=6, temperature=1.5)
    scored = model.generate({"image": images(2)}, return_scores=True, **sampling)
    torch.manual_seed(0)
    assert [caption.answer for caption in scored] == model.generate({"image": images(2)}, **sampling)
    assert len(scored) == 6 and len({caption.log_prob for caption in scored}) > 1


def test_a_candidate_with_a_line_break_is_ranked_as_one_line(build, images):
    model, batch = build().eval(), asked(images)
    ranked = [
        model.predict_answers(batch, inference_method="rank", answer_list=answers, prompt=PROMPT, return_scores=True)
        for answers in ([f"a cat{between}on a mat" for between in ("\n", "\t ", "\r\n")], ["a cat on a mat"])
    ]
    assert ranked[0] == ranked[1] and ranked[0][0].answer == "a cat on a mat"


def test_the_fewest_tokens_are_new_ones(build, images):
    """The prompt's do not count, in answers as in captions."""
    model, batch = build().eval(), asked(images)
    search = dict(num_beams=1, return_scores=True)
    soft_prompt, contexts = model.encode(batch).soft_prompt, model._question_contexts(batch, PROMPT)
    begun = continue_texts(model.opt_model, model.opt_tokenizer, soft_prompt, contexts, Search(1), stop=-1)
    model.eos_token_id = begun[0].ids[0]  # the first answer would end where it begins
    assert model.predict_answers(batch, prompt=PROMPT, min_len=0, **search)[0].num_tokens == 1
    for least in (1, 9):
        answers = model.predict_answers(batch, prompt=PROMPT, max_len=12, min_len=least, **search)
        captions = model.generate({**batch, "prompt": "a photo of"}, max_length=12, min_length=least, **search)
        for text in answers + captions:
            ends = text.num_tokens < 12  # the newline counts where there is one
            assert text.num_tokens - ends >= least


def test_the_log_probabilities_of_given_answers_are_the_losses(build, vqa_batch):
    model = build().eval()
    found = answer_log_probs(model, vqa_batch)
    rows = [0, 0, 0, 1]
    for value, row, answer in zip(found.tolist(), rows, vqa_batch["answer"]):
        assert value == pytest.approx(log_probability(model, one(vqa_batch, row), answer), abs=1e-4)


def test_they_are_the_same_where_questions_share_an_image(build, vqa_batch):
    model, image = build().eval(), vqa_batch["image"][:1]
    apart = answer_log_probs(model, {**vqa_batch, "image": image.expand(2, -1, -1, -1)})
    shared = answer_log_probs(model, {**vqa_batch, "image": image, "image_index": torch.tensor([0, 0])})
    torch.testing.assert_close(shared, apart, rtol=1e-5, atol=1e-5)
