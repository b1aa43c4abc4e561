"""The full model: its path, what is trained, what the loss sees, and equality with LAVIS's own Blip2OPT."""

import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch.nn.utils.rnn import pad_sequence

from lavis_kvmod import Blip2OPTKVMod
from lavis_kvmod.models.language.answers import answers_of
from lavis_kvmod.models.language.soft_prompt import continue_texts
from lavis_kvmod.models.language.text import prompt_batch
from lavis_kvmod.models.settings import ModelSettings
from lavis_kvmod.weights import files as checkpoints
from lavis_kvmod.weights import finding, reading
from lavis_kvmod.weights.files import CheckpointError
from lavis_kvmod.weights.finding import MissingWeightsError


def image_batch(images, b=3, captions=True):
    batch = {"image": images(b)}
    if captions:
        batch["text_input"] = ["a photo of a cat", "a photo of a mat on a cat", "a cat"][:b]
    return batch


# ------------------------------------------------------------------ the path


@pytest.mark.parametrize("sharing", ["shared", "per_layer"])
@pytest.mark.parametrize("gate", ["none", "tanh"])
def test_prefix_reaches_the_output(build, vqa_batch, sharing, gate):
    model = build(prefix_sharing=sharing, prefix_gate=gate).eval()
    if gate == "tanh":
        model.kv_gate.data.fill_(0.5)
    loss = model({**vqa_batch})["loss"]
    encoder = model.aux_encoder.forward
    model.aux_encoder.forward = lambda image: encoder(image) + 1.0
    torch.manual_seed(0)
    changed = model({**vqa_batch})["loss"]
    assert not torch.allclose(loss, changed, rtol=1e-5)


def test_without_modulation_there_is_no_second_encoder(build, files):
    model = build(kv_modulation=False, aux_checkpoint="/nowhere")
    assert not [k for k in model.state_dict() if k.startswith(("aux_encoder", "kv_"))]


def test_attention_maps_show_the_prefix_first(build, images):
    model = build(num_prefix_tokens=3).eval()
    maps = model.encode({"image": images(2)}, output_attentions=True).query_output.cross_attentions
    assert [m.shape for m in maps] == [(2, 4, 5, 3 + 5)] * 2


def test_published_geometry():
    """Prefix (b,12,8,64), Keys (b,12,265,64), six cross-attention layers, soft prompt width of the Q-Former."""
    from lavis_kvmod import KVPrefixGenerator
    from lavis_kvmod.models.connectors.kv_prefix import KVPrefix
    from lavis_kvmod.models.connectors.qformer import QFormer

    qformer = QFormer(encoder_width=1408).eval()
    assert sum(p.numel() for p in qformer.parameters()) == 105_137_664
    k, v = KVPrefixGenerator()(torch.randn(2, 1536))
    assert k.shape == v.shape == (2, 12, 8, 64)
    out = qformer(
        query_embeds=torch.randn(2, 32, 768),
        encoder_hidden_states=torch.randn(2, 257, 1408),
        prefix=[KVPrefix(k, v)] * 6,
        output_attentions=True,
    )
    assert out.last_hidden_state.shape == (2, 32, 768)
    assert [m.shape for m in out.cross_attentions] == [(2, 12, 32, 265)] * 6


@pytest.mark.parametrize("gate", ["none", "tanh"])
def test_prefix_attention_share(build, images, gate):
    batch = {"image": images(2)}
    model = build(prefix_gate=gate, num_prefix_tokens=3).eval()
    share = model.prefix_attention_share(batch)
    if gate == "tanh":
        assert share == 0
        model.kv_gate.data.fill_(0.5)
        opened = torch.tensor(0.5).tanh().item()
        assert model.prefix_attention_share(batch) == pytest.approx(opened / (1 + opened), rel=1e-5)
    else:
        maps = model.encode(batch, output_attentions=True).query_output.cross_attentions
        assert share == pytest.approx(torch.stack(maps)[..., :3].sum(-1).mean().item())
        assert 0 < share < 1
    assert build(kv_modulation=False).prefix_attention_share(batch) is None


def test_features_are_lavis_features(build, images):
    model = build()
    features = model.extract_features({"image": images(2)})
    assert features.image_embeds.shape == (2, 5, 32)
    assert torch.equal(features.image_embeds_proj, model.opt_proj(features.image_embeds))
    with pytest.raises(ValueError, match="expected 'image'.*got 'multimodal'"):
        model.extract_features({"image": images(2)}, mode="multimodal")


# ------------------------------------------------------------------ equality with LAVIS


def spied(opt_model, monkeypatch):
    """The token ids that LAVIS's language model will generate, call by call."""
    generate, ids = opt_model.generate, []
    monkeypatch.setattr(opt_model, "generate", lambda *args, **kwargs: ids.append(generate(*args, **kwargs)) or ids[-1])
    return ids


def spied_ours(model, monkeypatch):
    """The same of our own decoding: prompt and new tokens, padded as transformers does."""
    ids = []

    def spy(opt, tokenizer, soft_prompt, contexts, search, **kwargs):
        added = continue_texts(opt, tokenizer, soft_prompt, contexts, search, **kwargs)
        text = prompt_batch(tokenizer, contexts, "cpu").input_ids.repeat_interleave(len(added) // len(contexts), dim=0)
        new = [torch.tensor(each.ids) for each in added]
        padded = pad_sequence(new, batch_first=True, padding_value=tokenizer.pad_token_id)
        ids.append(torch.cat([text, padded], dim=1))
        return added

    monkeypatch.setattr("lavis_kvmod.models.soft_prompts.continue_texts", spy)
    return ids


@pytest.mark.parametrize(
    "ours",
    [dict(kv_modulation=False), dict(prefix_gate="tanh"), dict(kv_modulation=False, freeze_vit=False)],
    ids=str,
)
@pytest.mark.parametrize("prompt", ["", "a photo of"])
def test_equal_to_stock(build, stock, images, monkeypatch, ours, prompt):
    """Same weights, same Q-Former output, same loss, same gradients, same generated tokens."""
    model = build(prompt=prompt, **ours).eval()
    stock = stock.eval()
    stock.prompt = prompt
    stock.prompt_length = stock.opt_tokenizer(prompt, return_tensors="pt").attention_mask.sum(1)
    batch = image_batch(images, b=2)  # both captions start with the prompt

    visual_tokens = stock.ln_vision(stock.visual_encoder(batch["image"]))
    of_qformer = stock.Qformer.bert(
        query_embeds=stock.query_tokens.expand(2, -1, -1), encoder_hidden_states=visual_tokens, return_dict=True
    ).last_hidden_state
    assert (model.encode(batch).query_output.last_hidden_state - of_qformer).abs().max() <= 1e-5

    stock.visual_encoder.requires_grad_(not model.freeze_vit)
    loss, expected = model({**batch})["loss"], stock({**batch})["loss"]
    assert abs(loss - expected) <= 1e-5

    loss.backward()
    expected.backward()
    of_stock = dict(stock.named_parameters())
    compared = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.startswith("kv_"):
            reference = of_stock[name].grad
            if name.endswith("key.bias"):  # it shifts all scores of a softmax alike: LAVIS computes rounding
                assert not parameter.grad.any() and reference.abs().max() <= 1e-6, name
            else:
                assert (parameter.grad - reference).norm() <= 1e-4 * reference.norm(), name
            compared.add(name)
    trained_by_lavis = {name for name, parameter in of_stock.items() if parameter.grad is not None}
    assert trained_by_lavis - compared == ({"ln_vision.weight", "ln_vision.bias"} if model.freeze_vit else set())
    assert compared <= trained_by_lavis

    del batch["text_input"]
    ids, expected_ids = spied_ours(model, monkeypatch), spied(stock.opt_model, monkeypatch)
    for search in (dict(num_beams=1), dict(num_beams=5), dict(num_beams=4, num_captions=2)):
        assert model.generate({**batch}, max_length=8, **search) == stock.generate({**batch}, max_length=8, **search)
    sampled = dict(use_nucleus_sampling=True, num_captions=2, max_length=8, temperature=1.5)
    torch.manual_seed(5)
    got = model.generate({**batch}, **sampled)
    torch.manual_seed(5)
    assert got == stock.generate({**batch}, **sampled)
    assert len(ids) == 4 and all(torch.equal(*both) for both in zip(ids, expected_ids))


def test_searches_that_end_early_are_those_of_stock(build, stock, images, monkeypatch):
    """A text that has met its newline waits, padded, for the others; such a beam competes with those that go on."""
    model, stock, batch = build(kv_modulation=False).eval(), stock.eval(), {"image": images(4)}
    ids, expected = spied_ours(model, monkeypatch), spied(stock.opt_model, monkeypatch)
    model.generate(batch, num_beams=1, max_length=8)
    liked = model.opt_model.lm_head.weight[ids.pop()[0, -5]].clone()  # what the first text has in its middle
    some_ended = set()
    for scale in (1.02, 1.1, 1.2, 1.3):
        with torch.no_grad():  # the newline becomes likelier than that
            for part in (model, stock):
                part.opt_model.lm_head.weight[part.eos_token_id] = scale * liked
        for search in (dict(num_beams=1), dict(num_beams=5), dict(num_beams=4, num_captions=2)):
            assert model.generate(batch, max_length=8, **search) == stock.generate(batch, max_length=8, **search)
            assert torch.equal(ids[-1], expected[-1])
            ended = (ids[-1] == model.opt_tokenizer.pad_token_id).any(1)
            some_ended.update([str(search)] if ended.any() and not ended.all() else [])
    assert len(some_ended) == 3


def test_state_dict_keys_are_stock_keys_and_the_prefix(build, stock):
    model = build(prefix_gate="tanh")
    own, expected = set(model.state_dict()), set(stock.state_dict())
    assert expected <= own
    assert {k.split(".")[0] for k in own - expected} == {"kv_prefix", "kv_gate", "aux_encoder"}


def test_generation_feeds_one_position_a_step(build, images):
    """With the Key/Value cache used; stock LAVIS recomputes the whole sequence."""
    model = build().eval()
    lengths = []
    layer = model.opt_model.model.decoder.layers[0]
    layer.register_forward_hook(lambda _, x, __: lengths.append(x[0].shape[1]))
    model.generate({"image": images(2)}, num_beams=3, max_length=6, min_length=6)
    assert lengths[0] == 5 + 1  # soft prompt and BOS
    assert lengths[1:] and set(lengths[1:]) == {1}


# ------------------------------------------------------------------ what is trained


def test_trained_set_is_exactly_prefix_qformer_and_projection(build):
    model = build(prefix_gate="tanh")
    trained = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"kv_prefix", "kv_gate", "Qformer", "query_tokens", "opt_proj"}
    all_of = {n for n, _ in model.named_parameters() if n.split(".")[0] in trained}
    assert all_of == {n for n, p in model.named_parameters() if p.requires_grad}
    states = {row.part: row.trained for row in model.parts()}
    assert {part for part, is_trained in states.items() if is_trained} == trained
    assert sum(row.parameters for row in model.parts()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("modulation", [True, False])
@pytest.mark.parametrize("gate", ["none", "tanh"])
def test_frozen_stays_frozen_and_trained_is_trained(build, vqa_batch, modulation, gate):
    """20 steps in train mode: every trained parameter gets a gradient and moves, nothing else changes, buffers
    (BatchNorm statistics) included."""
    model = build(kv_modulation=modulation, prefix_gate=gate).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.5)
    for step in range(20):
        model({**vqa_batch})["loss"].backward()
        if step == 0:
            assert [n for n, p in trained.items() if p.grad is None] == []
        optimizer.step()
        optimizer.zero_grad()
    after = model.state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved <= set(trained)
    unmoved = set(trained) - moved
    concatenated = modulation and gate == "none"  # only then do the Keys of one softmax have several biases
    unseen = {k for k in trained if k.endswith("key.bias") and not (concatenated and ".crossattention." in k)}
    if modulation and not concatenated:
        unseen.add("kv_prefix.k_proj.bias")
    assert unmoved == unseen


def test_frozen_parts_stay_in_eval_mode(build):
    model = build().train()
    assert model.Qformer.training and model.kv_prefix.training
    for part in (model.visual_encoder, model.ln_vision, model.aux_encoder, model.opt_model):
        assert not any(module.training for module in part.modules())
    model.aux_encoder.train()
    model.opt_model.train()
    assert not any(m.training for m in [*model.aux_encoder.modules(), *model.opt_model.modules()])


def test_closed_gate_changes_nothing_until_the_first_step(build, vqa_batch):
    """Bit-equal in training mode too, dropout and all; after one step no longer."""

    def losses(model, steps=2):
        torch.manual_seed(3)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        out = []
        for _ in range(steps):
            loss = model({**vqa_batch})["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            out.append(loss.item())
        return out

    plain = losses(build(kv_modulation=False).train())
    gated = losses(build(prefix_gate="tanh").train())
    assert gated[0] == plain[0]
    assert gated[1] != plain[1]


def test_unfreezing_the_vit_trains_it_in_float32_and_says_so(build, images, caplog):
    with caplog.at_level("INFO"):
        model = build(freeze_vit=False, vit_precision="fp16").train()
    assert "so its weights are fp32, not fp16: half precision loses small updates" in caplog.text
    assert {p.dtype for p in model.visual_encoder.parameters()} == {torch.float32}
    model(image_batch(images))["loss"].backward()
    assert model.visual_encoder.patch_embed.proj.weight.grad.abs().sum() > 0
    assert model.ln_vision.weight.grad is not None


# ------------------------------------------------------------------ what the loss sees


def test_loss_is_on_the_answer_alone(build, vqa_batch, monkeypatch):
    """Other labels in the question's place change nothing; the answer's do."""
    from lavis_kvmod.models import blip2_opt_kvmod as module

    model = build().eval()
    batches = []
    original = module.answer_batch

    def record(*args):
        batches.append(original(*args))
        return batches[-1]

    monkeypatch.setattr(module, "answer_batch", record)
    vqa_batch = {**vqa_batch, "n_answers": torch.tensor([1, 1]), "answer": ["seven", "red"]}
    vqa_batch["weight"] = torch.ones(2)
    loss = model(vqa_batch)["loss"]
    (text,) = batches
    decoded = [model.opt_tokenizer.decode(ids[labels != -100]) for ids, labels in zip(text.input_ids, text.labels)]
    assert decoded == [" seven\n", " red\n"]

    features = model.encode(vqa_batch).soft_prompt
    question = (text.labels == -100) & (text.attention_mask == 1)
    assert question.sum() > 10
    again = model._language_loss(features, text, None)["loss"]
    assert torch.equal(again, loss)
    as_answer = text.labels.clone()
    as_answer[text.labels != -100] = as_answer[text.labels != -100].flip(0)
    assert not torch.equal(model._language_loss(features, text._replace(labels=as_answer), None)["loss"], loss)
    # the question still matters as input
    other = {**vqa_batch, "text_input": ["is the digit even", "is the digit even"]}
    assert not torch.equal(model(other)["loss"], loss)


def test_all_answers_weighted(build, vqa_batch):
    """`all` is the weighted token mean over every answer, as is any loss in eval mode; `sample` takes one a question,
    by weight."""
    model = build(answer_loss="all").eval()
    out = model({**vqa_batch})
    together = out["loss"]
    assert torch.equal(build(answer_loss="sample").eval()({**vqa_batch})["loss"], together)
    total, mass = 0.0, 0.0
    rows = [0, 0, 0, 1]
    for row, answer, weight in zip(rows, vqa_batch["answer"], vqa_batch["weight"]):
        one = {
            "image": vqa_batch["image"][row : row + 1],
            "text_input": [vqa_batch["text_input"][row]],
            "answer": [answer],
            "weight": torch.ones(1),
            "n_answers": torch.tensor([1]),
            "prompt": vqa_batch["prompt"],
        }
        tokens = len(model.opt_tokenizer(f" {answer}\n", add_special_tokens=False).input_ids)
        total += weight * tokens * model(one)["loss"].detach()
        mass += weight * tokens
    assert torch.allclose(together, total / mass, atol=1e-5)
    assert torch.allclose(out["loss_weight"], torch.as_tensor(mass))


def test_sampled_answers_follow_their_weights(vqa_batch):
    torch.manual_seed(0)
    drawn = [answers_of(vqa_batch, draw=True).answers for _ in range(400)]
    first = [answers[0] for answers in drawn]
    assert {answers[1] for answers in drawn} == {"red"}
    for answer, weight in zip(["seven", "one", "nine"], [0.6, 0.3, 0.1]):
        assert abs(first.count(answer) / 400 - weight) < 0.08


def test_the_draw_hangs_on_the_samples_seed_alone(vqa_batch):
    """Not on the random state, nor on what else is in the batch: several processes draw as one does."""
    alone = {**vqa_batch, "answer": vqa_batch["answer"][:3], "weight": vqa_batch["weight"][:3]}
    alone.update(n_answers=vqa_batch["n_answers"][:1], text_input=vqa_batch["text_input"][:1])
    drawn = [answers_of({**vqa_batch, "sample_seeds": [seed, 0]}, draw=True).answers[0] for seed in range(300)]
    assert drawn == [answers_of({**alone, "sample_seeds": [seed]}, draw=True).answers[0] for seed in range(300)]
    for answer, weight in zip(["seven", "one", "nine"], [0.6, 0.3, 0.1]):
        assert abs(drawn.count(answer) / 300 - weight) < 0.08


def test_a_drawn_answer_weighs_what_its_questions_answers_weigh(build, vqa_batch, monkeypatch):
    """A fifth of the weight is a fifth of the loss, whether answers are drawn or all are taken."""
    two = {**vqa_batch, "answer": ["seven", "red"], "n_answers": torch.tensor([1, 1])}

    def losses(answer_loss, weights):
        model = build(answer_loss=answer_loss, kv_modulation=False).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            elif hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
        return model({**two, "weight": torch.tensor(weights)})

    for weights in ([1.0, 1.0], [0.2, 1.0]):
        drawn, both = losses("sample", weights), losses("all", weights)
        assert torch.allclose(drawn["loss"], both["loss"]) and torch.allclose(drawn["loss_weight"], both["loss_weight"])
    assert not torch.allclose(drawn["loss"], losses("sample", [1.0, 1.0])["loss"])
    assert answers_of(vqa_batch, draw=True).weights is None  # shares of one question add up to 1
    shared = answers_of({**vqa_batch, "weight": torch.tensor([0.3, 0.15, 0.05, 1.0])}, draw=True)
    assert shared.weights.tolist() == [0.5, 1.0]
    nothing = answers_of({**vqa_batch, "weight": torch.zeros(4)}, draw=True)
    assert nothing.weights is None and nothing.answers[1] == "red"


def test_training_and_evaluation_use_one_prompt(build, vqa_batch):
    model = build(prompt="Q: {} A:")
    del vqa_batch["prompt"]
    from_model = model._question_contexts(vqa_batch)
    assert model.opt_tokenizer.decode(from_model[0]) == "</s>Q: which digit is written A:"
    assert model._question_contexts(vqa_batch, "Q: {} A:") == from_model
    model.prompt = "a photo of"  # a caption's prompt is no question's frame
    assert model.opt_tokenizer.decode(model._question_contexts(vqa_batch)[1]) == ("</s>what colour is the ink")


# ------------------------------------------------------------------ generation


def test_answers_do_not_depend_on_the_batch(build, images):
    """Left padding: a question of another length in the batch changes nothing."""
    model = build().eval()
    questions = ["is it even", "what colour is the ink of the digit that is written on the mat"]
    prompt = "Question: {} Short answer:"
    batch = {"image": images(2), "text_input": questions}
    both = model.predict_answers({**batch}, prompt=prompt, num_beams=3)
    for i in range(2):
        one = {"image": batch["image"][i : i + 1], "text_input": [questions[i]]}
        assert model.predict_answers(one, prompt=prompt, num_beams=3) == both[i : i + 1]


def test_prompt_may_be_a_list(build, images):
    model = build().eval()
    prompts = ["a photo of", "a photo of a cat on"]
    batch = {"image": images(2), "prompt": prompts}
    both = model.generate(batch, num_beams=2, max_length=6)
    for i in range(2):
        one = {"image": batch["image"][i : i + 1], "prompt": prompts[i]}
        assert model.generate(one, num_beams=2, max_length=6) == both[i : i + 1]
    asked = {"image": images(2), "text_input": "is it even"}
    frames = ["Question: {} Answer:", "{} yes or no?"]
    assert len(model.predict_answers(asked, prompt=frames)) == 2
    with pytest.raises(ValueError, match="one for each of the 2 samples; got 3"):
        model.generate({"image": images(2), "prompt": ["a"] * 3})


# ------------------------------------------------------------------ bad input


def test_wrong_batches_are_refused(build, images, vqa_batch):
    model = build()
    with pytest.raises(ValueError, match=r"expected images \(b, 3, 28, 28\), got \(1, 3, 32, 32\)"):
        model({"image": torch.zeros(1, 3, 32, 32), "text_input": ["a cat"]})
    with pytest.raises(ValueError, match="sample 1 of the batch has an empty question"):
        model({**vqa_batch, "text_input": ["why", " "]})
    with pytest.raises(ValueError, match="sample 0 of the batch has an empty question"):
        model.predict_answers({"image": images(1), "text_input": [""]})
    with pytest.raises(ValueError, match="2 images but 3 questions"):
        model.predict_answers({"image": images(2), "text_input": ["a", "b", "c"]})
    with pytest.raises(ValueError, match="caption 0 of the batch is empty"):
        model({"image": images(1), "text_input": [""]})
    with pytest.raises(ValueError, match="4 answers, 4 weights, n_answers adding up to 3"):
        model({**vqa_batch, "n_answers": torch.tensor([2, 1])})
    with pytest.raises(ValueError, match="sample 1 of the batch has no answer"):
        model({**vqa_batch, "n_answers": torch.tensor([4, 0])})
    with pytest.raises(ValueError, match="answer 1 of the batch is empty"):
        model({**vqa_batch, "answer": ["seven", "seven", "seven", " "]})
    with pytest.raises(ValueError, match="no longer than its prompt"):
        build(prompt="a photo of a cat", max_txt_len=3)({"image": images(1), "text_input": ["a photo of a cat"]})


def test_a_batch_of_one(build, vqa_batch):
    one = {
        **vqa_batch,
        "image": vqa_batch["image"][:1],
        "text_input": vqa_batch["text_input"][:1],
        "answer": ["seven"],
        "weight": torch.ones(1),
        "n_answers": torch.tensor([1]),
    }
    assert build().train()(one)["loss"].isfinite()


# ------------------------------------------------------------------ checkpoints


def test_stock_checkpoint_leaves_missing_only_prefix_and_towers(build, files):
    report = build(prefix_gate="tanh").load_checkpoint(str(files.blip2))
    assert report.unexpected_keys == []
    assert {k.split(".")[0] for k in report.missing_keys} == {
        "visual_encoder",
        "opt_model",
        "aux_encoder",
        "kv_prefix",
        "kv_gate",
    }


def test_what_we_save_loads_back(build, model_config, files, tmp_path, images):
    model = build(seed=1, prefix_gate="tanh")
    model.kv_gate.data.fill_(0.3)
    with torch.no_grad():
        for parameter in model.Qformer.parameters():
            parameter.add_(0.01)
    state = checkpoints.trained_state_dict(model)
    assert {k.split(".")[0] for k in state} == {
        "kv_prefix",
        "kv_gate",
        "Qformer",
        "query_tokens",
        "opt_proj",
    }
    assert not [k for k in state if k.endswith("position_ids")]
    checkpoints.save({"model": state}, tmp_path / "ours.pth")

    batch = {"image": images(2)}
    expected = model.eval().encode(batch).soft_prompt
    again = build(seed=2, prefix_gate="tanh").eval()
    assert not torch.allclose(again.encode(batch).soft_prompt, expected)
    again.load_checkpoint(str(tmp_path / "ours.pth"))
    assert torch.equal(again.encode(batch).soft_prompt, expected)

    # as LAVIS's `finetuned`: ln_vision, frozen and so not in our file, comes from `pretrained`
    named = build(seed=3, prefix_gate="tanh", load_finetuned=True, finetuned=str(tmp_path / "ours.pth")).eval()
    assert torch.equal(named.encode(batch).soft_prompt, expected)
    with pytest.raises(CheckpointError, match=r"2 missing:\s+ln_vision.bias\s+ln_vision.weight"):
        build(
            load_finetuned=True,
            finetuned=str(tmp_path / "ours.pth"),
            pretrained=None,
            prefix_gate="tanh",
        )
    # and so that file is looked at before anything is loaded; but not for one that holds ln_vision itself
    ours = {"load_finetuned": True, "finetuned": str(tmp_path / "ours.pth"), "pretrained": "/nowhere/blip2.pth"}
    with pytest.raises(MissingWeightsError, match="no such file /nowhere/blip2.pth; set model.pretrained"):
        finding.require(ModelSettings.from_config(model_config(**ours)).weight_files())
    whole = ModelSettings.from_config(model_config(**{**ours, "finetuned": str(files.blip2)}))
    finding.require(whole.weight_files())


def test_checkpoints_that_do_not_fit_list_their_keys(build, files, tmp_path):
    model = build()
    state = reading.read_weights(files.blip2)
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def refused(changed, match):
        torch.save({"model": changed}, tmp_path / "bad.pth")
        with pytest.raises(CheckpointError, match=match):
            model.load_checkpoint(str(tmp_path / "bad.pth"))

    refused({k: v for k, v in state.items() if k != "opt_proj.bias"}, r"1 missing:\s+opt_proj.bias")
    refused({**state, "vision_proj.bias": torch.zeros(1)}, r"1 unexpected:\s+vision_proj.bias")
    refused(
        {**state, "query_tokens": torch.zeros(1, 9, 32)},
        r"1 of another shape:\s+query_tokens \(expected \(1, 5, 32\), got \(1, 9, 32\)\)",
    )
    # half a prefix is not a stock checkpoint
    refused(
        {**state, "kv_prefix.prefix_tokens": torch.zeros(8, 32)},
        r"8 missing:\s+kv_prefix.k_proj.bias",
    )
    # a prefix, and a model without one
    with pytest.raises(CheckpointError, match=r"9 unexpected:\s+kv_prefix"):
        checkpoints.save({"model": checkpoints.trained_state_dict(model)}, tmp_path / "kv.pth")
        build(kv_modulation=False).load_checkpoint(str(tmp_path / "kv.pth"))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


# ------------------------------------------------------------------ feature cache


def test_cached_features_are_the_same_and_computed_once(build, images):
    model, plain = build(cache_frozen_features=True).eval(), build().eval()
    calls = []
    model.visual_encoder.register_forward_hook(lambda *args: calls.append(len(args[1][0])))
    batch = {"image": images(3), "image_key": ["a", "b", "a"]}
    batch["image"][2] = batch["image"][0]
    expected = plain.encode(batch).soft_prompt
    for _ in range(2):
        assert torch.allclose(model.encode(batch).soft_prompt, expected, atol=1e-6)
    assert calls == [16]  # always as many, so that an image's features do not depend on its company
    model.encode({"image": images(2, seed=9), "image_key": ["b", "c"]})
    assert calls == [16, 16]
    model.encode({"image": images(2)})  # no promise, no cache
    assert calls == [16, 16, 2]


def test_cached_features_do_not_depend_on_the_company(build, images):
    """A run that is resumed meets an image in another batch: its features must be the same to the last bit."""
    together = images(20)
    whole, alone = (build(cache_frozen_features=True).eval() for _ in range(2))
    encoded = whole.encode({"image": together, "image_key": list(range(20))})
    for row in (3, 17):
        alone.encode({"image": together[row : row + 1], "image_key": [row]})
        for one, other in zip(whole.feature_cache._by_key[row], alone.feature_cache._by_key[row]):
            assert torch.equal(one, other)
    assert encoded.soft_prompt.shape[0] == 20


def test_cached_features_take_the_towers_precision(build, images):
    """Under autocast the layers' sum is fp32, of which a half-precision tower's features need half."""
    model = build(vit_precision="bf16", cache_frozen_features=True, feature_cache_gib=1).eval()
    batch = {"image": images(2), "image_key": ["a", "b"]}
    plain = model.encode({"image": batch["image"]}).soft_prompt
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.encode(batch)
    assert {model.feature_cache._by_key[key].visual_tokens.dtype for key in "ab"} == {torch.bfloat16}
    assert torch.allclose(model.encode(batch).soft_prompt, plain, atol=0.02)


# ------------------------------------------------------------------ precision on the CPU


@pytest.mark.parametrize("has_bf16", [True, False])
@pytest.mark.parametrize("vit, opt", [("fp16", "fp16"), ("bf16", "fp32"), ("fp32", "bf16"), ("bf16", "fp16")])
def test_half_precision_towers_on_the_cpu(build, images, monkeypatch, vit, opt, has_bf16):
    """`load_model` calls `float()`: frozen weights stay half as large where the processor has bfloat16."""
    from lavis_kvmod.models import base as module

    monkeypatch.setattr(module, "cpu_has_bf16", lambda: has_bf16)
    reference = build().eval()
    model = build(vit_precision=vit, opt_precision=opt).float().eval()
    dtypes = {row.part: row.dtype for row in model.parts()}
    assert dtypes["opt_model"] == ("bfloat16" if has_bf16 and opt != "fp32" else "float32")
    assert dtypes["visual_encoder"] == ("bfloat16+float32" if has_bf16 and vit != "fp32" else "float32")
    assert {row.dtype for row in model.parts() if row.trained} == {"float32"}
    batch = image_batch(images)
    loss, expected = model({**batch})["loss"], reference({**batch})["loss"]
    assert abs(loss - expected) <= (0.05 if has_bf16 else 0.01) * expected
    loss.backward()
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert len(model.generate({"image": batch["image"]}, num_beams=2, max_length=4)) == 3


@pytest.mark.parametrize("has_bf16", [True, False])
def test_half_precision_towers_through_lavis_loader(model_config, images, monkeypatch, tmp_path, has_bf16):
    from lavis.models import load_model_and_preprocess

    from lavis_kvmod.models import base as module

    processors = {"vis_processor": {"eval": {"name": "blip_image_eval", "image_size": 28}}}
    processors["text_processor"] = {"eval": {"name": "blip_caption"}}
    cfg = {"model": model_config(vit_precision="fp16", opt_precision="fp16"), "preprocess": processors}
    OmegaConf.save(OmegaConf.create(cfg), tmp_path / "small.yaml")
    monkeypatch.setitem(Blip2OPTKVMod.PRETRAINED_MODEL_CONFIG_DICT, "demo", str(tmp_path / "small.yaml"))
    monkeypatch.setattr(module, "cpu_has_bf16", lambda: has_bf16)
    model, _, _ = load_model_and_preprocess("blip2_opt_kvmod", "demo", is_eval=True, device="cpu")
    dtypes = {row.part: row.dtype for row in model.parts() if row.dtype != "float32"}
    assert dtypes == ({"visual_encoder": "bfloat16+float32", "opt_model": "bfloat16"} if has_bf16 else {})
    assert len(model.generate({"image": images(1)}, num_beams=2, max_length=3)) == 1


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cached", [False, True], ids=["", "cached"])
def test_without_amp_what_is_trained_computes_in_float32(build, images, half, cached):
    """Towers in half precision, each in its own; under the run's autocast all alike."""
    name = {torch.float16: "fp16", torch.bfloat16: "bf16"}[half]
    model = build(vit_precision=name, opt_precision=name, cache_frozen_features=cached)
    seen = {}
    layers = {
        "vit": model.visual_encoder.blocks[0].mlp.fc1,
        "qformer": model.Qformer.bert.encoder.layer[0].crossattention.self.key,
        "prefix": model.kv_prefix.mlp[0],
        "proj": model.opt_proj,
        "opt": model.opt_model.model.decoder.layers[0].fc1,
    }
    for part, layer in layers.items():
        layer.register_forward_hook(lambda *args, part=part: seen.update({part: args[2].dtype}))
    batch = {**image_batch(images), **({"image_key": ["a", "b", "c"]} if cached else {})}
    model(batch)["loss"].backward()
    trained = dict.fromkeys(("qformer", "prefix", "proj"), torch.float32)
    assert seen == {"vit": half, "opt": half, **trained}
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    if half is torch.float16:  # the CPU's autocast does not take it beside bfloat16
        return
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model({**image_batch(images)})["loss"].backward()
    assert set(seen.values()) == {torch.bfloat16}


def test_a_step_does_not_list_all_parameters_to_know_device_and_precision(build, vqa_batch, monkeypatch):
    model = build().train()
    for module in (model, model.visual_encoder, model.opt_model):
        monkeypatch.setattr(module, "parameters", lambda *args: pytest.fail("walked all parameters"))
    model({**vqa_batch})["loss"].backward()
    assert model.device == torch.device("cpu")


def test_float32_towers_are_left_alone(build):
    assert {row.dtype for row in build().float().parts()} == {"float32"}


def test_weight_files_may_be_written_again_once_they_are_loaded(build, files, tmp_path):
    """A model that kept views of its files would change with them, or crash."""
    copies = {}
    for key, file in (("vit_checkpoint", files.vit), ("pretrained", files.blip2), ("aux_checkpoint", files.b0)):
        copies[key] = shutil.copy(file, tmp_path)
    model = build(**copies)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for copy in map(Path, copies.values()):
        with open(copy, "r+b") as file:  # in place
            file.write(bytes(copy.stat().st_size))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
