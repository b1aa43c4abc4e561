"""Flamingo's layers between OPT's own: nothing at first, and the paper's arithmetic with open gates."""

import pytest
import torch

from lavis_kvmod.models.language.soft_prompt import token_losses
from lavis_kvmod.models.language.text import answer_batch, question_contexts
from lavis_kvmod.weights import files as checkpoints

GATED = dict(fusion="gated_cross_attention", gated_every=2)
QUESTIONS = ["which digit is written", "what colour is the ink"]


def opened(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in model.gated_layers.layers:
            layer.attention_gate.fill_(0.7)
            layer.feed_forward_gate.fill_(-0.4)
    return model


def losses(model, of_image, seeing=True):
    contexts = question_contexts(model.opt_tokenizer, QUESTIONS, "Question: {} Short answer:", 32)
    text = answer_batch(model.opt_tokenizer, contexts, ["seven", "red"], "cpu")
    nothing, context = model.into_language_model(of_image)
    if not seeing:
        return token_losses(model.opt_model, nothing, text)[1]
    with context:
        return token_losses(model.opt_model, nothing, text)[1]


def test_at_the_start_the_language_model_is_exactly_what_it_was(build, images):
    model = build(**GATED).eval()
    of_image = model.encode({"image": images(2)}).soft_prompt
    assert model.opt_proj is None and of_image.shape == (2, 8 + 5, 32) and model.gated_layers.places == (1,)
    assert torch.equal(losses(model, of_image), losses(model, of_image, seeing=False))
    with torch.no_grad():  # as in decoding
        assert torch.equal(losses(model, of_image), losses(model, of_image, seeing=False))
    opened(model)
    assert not torch.allclose(losses(model, of_image), losses(model, of_image, seeing=False), atol=1e-3)
    assert not model.opt_model.model.decoder.layers[1]._forward_pre_hooks  # nothing stays behind


def test_a_gated_layer_is_flamingos(build, images):
    model = opened(build(**GATED)).eval()
    layer = model.gated_layers.layers[0]
    x, image = torch.randn(4, 3, 32), torch.randn(2, 5, 32)

    def norm(x, module):
        return torch.nn.functional.layer_norm(x, (32,), module.weight, module.bias)

    for row in range(4):  # two copies of each image
        seen, own = image[row // 2], layer.attention
        q, k, v = norm(x[row], layer.norm) @ own.query.weight.T, seen @ own.key.weight.T, seen @ own.value.weight.T
        heads = [
            torch.softmax(q[:, s] @ k[:, s].T / 8**0.5, dim=-1) @ v[:, s]
            for s in map(slice, (0, 8, 16, 24), (8, 16, 24, 32))
        ]
        out = x[row] + torch.tanh(torch.tensor(0.7)) * torch.cat(heads, dim=-1) @ layer.out_proj.weight.T
        before, widen, _, narrow = layer.feed_forward
        hidden = (norm(out, before) @ widen.weight.T).clamp(min=0) ** 2
        out = out + torch.tanh(torch.tensor(-0.4)) * hidden @ narrow.weight.T
        assert torch.allclose(layer(x, image)[row], out, atol=1e-5)


@pytest.mark.parametrize("gate", ["none", "tanh"])
def test_the_layers_attend_to_a_prefix_of_their_own_in_front_of_the_image(build, images, gate):
    model = opened(build(connector="linear", pretrained=None, prefix_gate=gate, num_prefix_tokens=3, **GATED)).eval()
    gated, layer = model.gated_layers, model.gated_layers.layers[0]
    if gate == "tanh":
        torch.nn.init.normal_(gated.kv_gate)
    assert model.kv_prefix is None and [row.part for row in model.parts() if row.trained] == ["gated_layers"]
    features = model.frozen_features({"image": images(2)})
    seen = model.encode({"image": images(2)}).soft_prompt
    tokens = gated.kv_prefix.prefix_tokens + gated.kv_prefix.mlp(features.pooled)[:, None]
    assert torch.allclose(seen, torch.cat([tokens, features.visual_tokens], dim=1), atol=1e-6)

    x, own = torch.randn(2, 3, 32), layer.attention
    image, (prefix,) = gated._split(seen)
    k = [gated.kv_prefix.k_proj(tokens), own.key(features.visual_tokens)]
    v = [gated.kv_prefix.v_proj(tokens), own.value(features.visual_tokens)]

    def attended(k, v):
        q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in (own.query(layer.norm(x)), k, v))
        return (torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, dim=-1) @ v).transpose(1, 2)

    if gate == "none":
        out = attended(torch.cat(k, 1), torch.cat(v, 1))
    else:
        out = attended(k[1], v[1]) + gated.kv_gate[0].tanh()[:, None] * attended(k[0], v[0])
    out = x + torch.tanh(torch.tensor(0.7)) * layer.out_proj(out.flatten(2))
    out = out + torch.tanh(torch.tensor(-0.4)) * layer.feed_forward(out)
    assert torch.allclose(layer(x, image, prefix), out, atol=1e-5)
    twice = layer(x.repeat_interleave(2, dim=0), image, prefix)  # two beams of each
    assert torch.allclose(twice[::2], out, atol=1e-5) and torch.allclose(twice[1::2], out, atol=1e-5)


def test_a_prefix_that_is_taken_away_or_dropped_is_not_attended_to(build, images):
    model = opened(build(prefix_dropout=0.5, **GATED)).eval()
    stock = opened(build(kv_modulation=False, **GATED)).eval()
    with torch.no_grad():
        for name, value in stock.named_parameters():
            value.copy_(model.get_parameter(name))
    of_image = model.encode({"image": images(2)}, with_prefix=False).soft_prompt
    expected = losses(stock, stock.encode({"image": images(2)}).soft_prompt)
    assert torch.allclose(losses(model, of_image), expected, atol=1e-5)
    assert not torch.allclose(losses(model, model.encode({"image": images(2)}).soft_prompt), expected, atol=1e-4)
    features, drop = model.frozen_features({"image": images(2)}).pooled, torch.tensor([True, False])
    tokens = model.gated_layers.beside_prefix(torch.randn(2, 5, 32), features, drop)[:, :8]
    assert not tokens[0].any() and tokens[1].any(-1).all()


def test_decoding_and_ranking_see_the_image_as_the_loss_does(build, images):
    model = opened(build(**GATED)).eval()
    batch = {"image": images(2), "text_input": QUESTIONS, "prompt": "Question: {} Short answer:"}
    candidates = ["seven", "red", "yes", "nine"]
    ranked = model.predict_answers(batch, inference_method="rank", answer_list=candidates, return_scores=True)
    for row in range(2):  # the loss of a batch of one
        one = {**batch, "image": batch["image"][row : row + 1], "text_input": QUESTIONS[row : row + 1]}
        given = {**one, "answer": [ranked[row].answer], "weight": torch.ones(1), "n_answers": torch.tensor([1])}
        with torch.no_grad():
            loss = model(given)["loss"].item()
        assert -loss * ranked[row].num_tokens == pytest.approx(ranked[row].log_prob, rel=1e-4)
        for beams in (1, 3):
            (said,) = model.predict_answers(one, num_beams=beams, max_len=4, min_len=1, return_scores=True)
            in_batch = model.predict_answers(batch, num_beams=beams, max_len=4, min_len=1, return_scores=True)[row]
            assert said.answer == in_batch.answer and said.log_prob == pytest.approx(in_batch.log_prob, rel=1e-4)


def test_a_blip_2_checkpoint_gives_the_q_former_and_the_gates_start_closed(build, files, tmp_path):
    model = build(**GATED)
    stock = torch.load(files.blip2)["model"]
    assert torch.equal(model.query_tokens, stock["query_tokens"]) and "opt_proj.weight" in stock
    checkpoints.save({"model": checkpoints.trained_state_dict(opened(model))}, tmp_path / "ours.pth")
    again = build(seed=1, **GATED)
    again.load_checkpoint(str(tmp_path / "ours.pth"))
    assert again.gated_layers.layers[0].attention_gate.item() == pytest.approx(0.7)
    with pytest.raises(ValueError, match="gated_every: expected at most 2, the language model's layers, got 3"):
        build(fusion="gated_cross_attention", gated_every=3)
