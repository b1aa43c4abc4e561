"""Where the model looks: weights that sum to 1, equal to the softmax by hand, and nothing left behind."""

import math

import pytest
import torch

PROMPT = "Question: {} Short answer:"


def asked(images):
    return {"image": images(2), "text_input": ["which digit is written", "is the digit even"], "prompt": PROMPT}


def heads(x, num_heads):
    b, n, width = x.shape
    return x.view(b, n, num_heads, width // num_heads).transpose(1, 2)


@pytest.mark.parametrize("gate", [None, 0.5, -0.5])
def test_weights_are_the_softmax_by_hand(build, images, gate):
    model = build(prefix_gate="none" if gate is None else "tanh", num_prefix_tokens=3).eval()
    if gate is not None:
        model.kv_gate.data.fill_(gate)
    attention, inputs = model.Qformer.bert.encoder.layer[2].crossattention.self, []
    handle = attention.register_forward_pre_hook(lambda module, args: inputs.append(args))
    maps = model.attention_maps({"image": images(2)})
    handle.remove()
    assert maps.cross.shape == (2, 2, 4, 5, 3 + 5) and not maps.cross.requires_grad and maps.answers == []
    assert torch.allclose(maps.cross.sum(-1), torch.ones(2, 2, 4, 5))

    queries, visual = inputs[0][:2]
    key = heads(attention.key(visual), 4)
    q = heads(attention.query(queries), 4)
    of_prefix = model.prefixes(model.frozen_features({"image": images(2)}).pooled)[1].key
    if gate is None:
        by_hand = (q @ torch.cat([of_prefix, key], 2).transpose(-1, -2) / math.sqrt(8)).softmax(-1)
    else:
        opened = abs(math.tanh(gate))
        parts = [(q @ k.transpose(-1, -2) / math.sqrt(8)).softmax(-1) for k in (of_prefix, key)]
        by_hand = torch.cat([opened * parts[0], parts[1]], -1) / (1 + opened)
        assert torch.allclose(maps.prefix_share(), torch.tensor(opened / (1 + opened)))
    assert torch.allclose(maps.cross[:, 1], by_hand, atol=1e-6)


def test_an_answer_is_traced_through_every_layer(build, images):
    """Rollout against one matrix a layer over all positions: [places | prefix | queries | text]."""
    model = build(num_prefix_tokens=3).eval()
    batch = {**asked(images), "answer": ["seven", "no"]}
    maps = model.attention_maps(batch)
    row, trace, q, of_image = 1, maps.answers[1], 5, 3 + 5
    assert "".join(trace.tokens) == " no\n" and trace.answer == "no"
    assert torch.allclose(sum(s if s.ndim == 1 else s.sum(-1) for s in trace.sources), torch.ones(len(trace.tokens)))
    assert torch.allclose(sum(s if s.ndim == 2 else s.sum(-1) for s in maps.soft_prompt), torch.ones(2, q))

    def step(start, size, to, weights):
        matrix = torch.eye(size)
        rows = slice(start, start + weights.shape[0])
        matrix[rows] /= 2
        matrix[rows, to : to + weights.shape[1]] += weights / 2
        return matrix

    ids = model._question_contexts(batch)[row] + model.opt_tokenizer(" no\n", add_special_tokens=False).input_ids
    soft_prompt = model.encode(batch).soft_prompt[row : row + 1]
    embedded = torch.cat([soft_prompt, model.opt_model.get_input_embeddings()(torch.tensor([ids]))], 1)
    opt = model.opt_model.model.decoder(inputs_embeds=embedded, output_attentions=True, return_dict=True).attentions
    size = of_image + q + len(ids)
    whole, cross = torch.eye(size), iter(maps.cross[row])
    for i, own in enumerate(maps.self_attention[row]):
        whole = step(of_image, size, of_image, own.mean(0)) @ whole
        if i % 2 == 0:
            whole = step(of_image, size, 0, next(cross).mean(0)) @ whole
    for layer in opt:
        whole = step(of_image, size, of_image, layer[0].mean(0)) @ whole
    predicts = whole[of_image + q + len(ids) - len(trace.tokens) - 1 : -1]
    assert torch.allclose(trace.sources.prefix, predicts[:, :3], atol=1e-5)
    assert torch.allclose(trace.sources.places, predicts[:, 3:of_image], atol=1e-5)
    assert torch.allclose(trace.sources.queries, predicts[:, of_image : of_image + q].sum(-1), atol=1e-5)
    at = q + len(ids) - len(trace.tokens) - 1
    assert torch.allclose(trace.to_soft_prompt, torch.stack([a[0, :, at:-1, :q] for a in opt]), atol=1e-5)


def test_the_model_stays_as_it_was(build, images):
    model = build().eval()
    batch = asked(images)
    before, hooks = model.predict_answers(batch, num_beams=1), sum(len(m._forward_hooks) for m in model.modules())
    maps = model.attention_maps(batch)
    assert [trace.answer for trace in maps.answers] == before == model.predict_answers(batch, num_beams=1)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks == 0
    assert model.encode(batch).query_output.cross_attentions is None  # ordinary runs make none


def test_one_image_serves_several_texts(build, images):
    model = build().eval()
    whole = model.attention_maps({**asked(images), "image": images(1).expand(2, -1, -1, -1)})
    once = model.attention_maps({**asked(images), "image": images(1), "image_index": torch.tensor([0, 0])})
    assert once.cross.shape[0] == 1
    for one, other in zip(once.answers, whole.answers):
        assert torch.allclose(one.sources.places, other.sources.places, atol=1e-6)


def test_without_a_prefix_and_on_the_grid(build, images):
    maps = build(kv_modulation=False).eval().attention_maps({"image": images(1), "answer": "a cat"})
    assert maps.num_prefix == 0 and not maps.prefix_share().any()
    assert [len(trace.tokens) > 1 for trace in maps.answers] == [True]
    grid = maps.on_grid(torch.arange(5.0))
    assert grid.tolist() == [[1, 2], [3, 4]] and maps.on_grid(torch.zeros(7, 4)).shape == (7, 2, 2)
    with pytest.raises(ValueError, match="a square of visual positions.* got 7"):
        maps.on_grid(torch.zeros(7))
    with pytest.raises(ValueError, match="one answer for each of the 1 texts, got 2"):
        build(kv_modulation=False).attention_maps({"image": images(1), "answer": ["a", "b"]})
