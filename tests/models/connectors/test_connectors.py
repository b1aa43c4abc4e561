"""The connectors beside the Q-Former: each against an arithmetic of its own, straight from its paper."""

import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lavis_kvmod.commands.convert import convert
from lavis_kvmod.models.connectors import CONNECTORS, ConnectorSizes
from lavis_kvmod.models.connectors.c_abstractor import CAbstractor, most_square
from lavis_kvmod.models.connectors.kv_prefix import KVPrefix
from lavis_kvmod.models.connectors.perceiver import Perceiver
from lavis_kvmod.models.connectors.visual_abstractor import VisualAbstractor
from lavis_kvmod.models.empty import empty_weights
from lavis_kvmod.models.settings import ModelSettings, SettingsError
from lavis_kvmod.weights import files as checkpoints
from lavis_kvmod.weights.files import CheckpointError

WIDTH, HEADS, LATENTS, TOKENS = 16, 4, 3, 5
CLOSE = dict(atol=1e-5, rtol=1e-5)


def shaken(module, seed=0):
    """The module with all its numbers away from where they start, norms and zeros too."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module.eval()


def norm(x, module):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight + module.bias


def attention(q, k, v):
    """softmax(QKᵀ/√d)V, head by head and query by query: q (b, h, q, d), k and v (b, h, n, d) -> (b, q, h * d)."""
    out = torch.zeros_like(q)
    for b, h, i in [(b, h, i) for b in range(q.shape[0]) for h in range(q.shape[1]) for i in range(q.shape[2])]:
        weights = torch.exp(k[b, h] @ q[b, h, i] / q.shape[-1] ** 0.5)
        out[b, h, i] = (weights[:, None] * v[b, h]).sum(0) / weights.sum()
    return out.permute(0, 2, 1, 3).flatten(2)


def in_heads(x):
    return x.unflatten(-1, (HEADS, -1)).permute(0, 2, 1, 3)


def attended(layer, queries, context, prefix):
    """With the layer's projections; the prefix in front, or behind its gate in a softmax of its own."""
    inner = layer.attention
    q, k, v = (in_heads(of(x)) for of, x in ((inner.query, queries), (inner.key, context), (inner.value, context)))
    if prefix is None:
        return layer.out_proj(attention(q, k, v))
    if prefix.gate is None:
        k, v = torch.cat([prefix.key, k], dim=2), torch.cat([prefix.value, v], dim=2)
        return layer.out_proj(attention(q, k, v))
    gates = prefix.gate.repeat_interleave(WIDTH // HEADS)
    return layer.out_proj(attention(q, k, v) + gates * attention(q, prefix.key, prefix.value))


def flamingo(module, latents, frames, prefixes):
    """Its pseudo-code (appendix A.1.1), with pre-norms and a squared ReLU."""
    image = torch.cat([frames[:, t] + module.time_embeddings[t] for t in range(frames.shape[1])], dim=1)
    for layer, prefix in zip(module.layers, prefixes):
        own = norm(latents, layer.norm_latents)
        context = torch.cat([norm(image, layer.norm_image), own], dim=1)
        latents = latents + attended(layer, own, context, prefix)
        before, widen, _, narrow = layer.feed_forward
        hidden = norm(latents, before) @ widen.weight.T
        latents = latents + (hidden.clamp(min=0) ** 2) @ narrow.weight.T
    return norm(latents, module.norm)


def mplug_owl(module, queries, frames, prefixes):
    image = frames[:, 0]
    for layer, prefix in zip(module.layers, prefixes):
        context = norm(torch.cat([image, queries], dim=1), layer.norm_context)
        queries = queries + attended(layer, norm(queries, layer.norm_queries), context, prefix)
        x, ffn = norm(queries, layer.norm_feed_forward), layer.feed_forward
        gate = ffn.w1(x)
        queries = queries + ffn.w2(norm(gate * torch.sigmoid(gate) * ffn.w3(x), ffn.norm))
    return queries


ATTENDING = {
    "perceiver": (Perceiver, flamingo, 2),
    "visual_abstractor": (VisualAbstractor, mplug_owl, 1),
}


@pytest.fixture(params=ATTENDING)
def resampler(request):
    cls, by_hand, frames = ATTENDING[request.param]
    torch.manual_seed(1)
    module = shaken(cls(width=WIDTH, num_queries=LATENTS, depth=2, num_heads=HEADS))
    visual = torch.randn(2, frames, TOKENS, WIDTH)
    given = visual if frames > 1 else visual[:, 0]
    latents = torch.randn(2, LATENTS, WIDTH)
    return SimpleNamespace(module=module, by_hand=by_hand, visual=visual, given=given, latents=latents)


def prefix_of(gate):
    key, value = torch.randn(2, 2, HEADS, 4, WIDTH // HEADS)
    return KVPrefix(key, value, gate)


@pytest.mark.parametrize("kind", ["none", "one softmax", "gated"])
def test_a_resampler_is_its_paper_with_a_prefix_beside_the_image(resampler, kind):
    gate = torch.randn(HEADS).tanh() if kind == "gated" else None
    prefixes = [None, None] if kind == "none" else [prefix_of(gate), prefix_of(gate)]
    told = resampler.module(resampler.latents, resampler.given, None if kind == "none" else prefixes, True)
    expected = resampler.by_hand(resampler.module, resampler.latents, resampler.visual, prefixes)
    assert torch.allclose(told.last_hidden_state, expected, **CLOSE)
    width = resampler.visual.shape[1] * TOKENS + (0 if kind == "none" else 4)
    assert [tuple(m.shape) for m in told.cross_attentions] == [(2, HEADS, LATENTS, width)] * 2
    again = resampler.module(resampler.latents, resampler.given, None if kind == "none" else prefixes)
    assert again.cross_attentions is None and torch.allclose(again.last_hidden_state, expected, **CLOSE)


def test_a_resampler_refuses_what_does_not_fit(resampler):
    with pytest.raises(ValueError, match="one prefix for each of 2 cross-attention layers, got 1"):
        resampler.module(resampler.latents, resampler.given, [prefix_of(None)])
    with pytest.raises(ValueError, match="num_heads: expected a divisor of .* width 16, got 3"):
        type(resampler.module)(width=WIDTH, num_queries=LATENTS, num_heads=3)
    if isinstance(resampler.module, Perceiver):
        with pytest.raises(ValueError, match="expected at most 8 frames, got 9: set connector_geometry.max_frames"):
            resampler.module(resampler.latents, torch.randn(2, 9, TOKENS, WIDTH))


def honeybee(module, tokens):
    def convolution(x, one):  # of a map (b, rows, columns, width), which keeps its side
        weight, pad = one[0].weight, one[0].weight.shape[-1] // 2
        if pad == 0:
            return norm(x @ weight[:, :, 0, 0].T, one[1])
        x, out = F.pad(x, (0, 0, 1, 1, 1, 1)), 0
        for i in range(3):
            for j in range(3):
                out = out + x[:, i : x.shape[1] - 2 + i, j : x.shape[2] - 2 + j] * weight[:, 0, i, j]
        return norm(out, one[1])

    def block(x, one):
        inner = F.silu(convolution(F.silu(convolution(x, one.conv1)), one.conv2))
        mean = inner.mean((1, 2))
        weights = F.relu(mean @ one.se.squeeze.weight[:, :, 0, 0].T + one.se.squeeze.bias)
        weights = torch.sigmoid(weights @ one.se.excite.weight[:, :, 0, 0].T + one.se.excite.bias)
        shortcut = x if isinstance(one.shortcut, nn.Identity) else convolution(x, one.shortcut)
        return F.silu(convolution(inner * weights[:, None, None], one.conv3) + shortcut)

    grid = (tokens[:, 1:] + module.positions).unflatten(1, (4, 4))
    for one in module.before:
        grid = block(grid, one)
    grid = torch.stack([torch.stack([grid[:, 2 * i : 2 * i + 2, j].mean(1) for j in range(4)], 1) for i in (0, 1)], 1)
    for one in module.behind:
        grid = block(grid, one)
    return F.silu(grid.flatten(1, 2) @ module.readout.weight.T + module.readout.bias)


def test_the_c_abstractor_is_honeybees():
    sizes = dict(visual_width=WIDTH, num_visual_tokens=17, num_queries=8, output_width=6, hidden_size=12, depth=2)
    torch.manual_seed(0)
    module = shaken(CAbstractor(**sizes))
    tokens = torch.randn(2, 17, WIDTH)
    told = module(None, tokens).last_hidden_state
    assert told.shape == (2, 8, 6) and torch.allclose(told, honeybee(module, tokens), **CLOSE)
    assert CAbstractor(**{**sizes, "num_visual_tokens": 16}).class_tokens == 0
    with pytest.raises(ValueError, match="expected a square number of visual tokens, or one more .*, got 15"):
        CAbstractor(**{**sizes, "num_visual_tokens": 15})
    assert [most_square(number) for number in (1, 7, 8, 32, 64, 144)] == [
        (1, 1),
        (1, 7),
        (2, 4),
        (4, 8),
        (8, 8),
        (12, 12),
    ]


def test_llavas_projectors_are_one_and_two_layers(build, images):
    model = build(connector="mlp", pretrained=None, kv_modulation=False)
    llava = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
    llava[0].load_state_dict(model.Qformer.proj.state_dict())
    llava[2].load_state_dict(model.opt_proj.state_dict())
    visual = model.ln_vision(model.visual_encoder(images(2)))
    assert torch.equal(model.encode({"image": images(2)}).soft_prompt, llava(visual))
    assert not hasattr(model.query_tokens, "shape") and model.num_soft_prompt == visual.shape[1] == 5

    model = build(connector="linear", pretrained=None)
    visual = model.ln_vision(model.visual_encoder(images(2)))
    pooled = model.aux_encoder(images(2))
    of_aux = pooled @ model.aux_tokens.proj.weight.T + model.aux_tokens.proj.bias
    expected = torch.cat([of_aux[:, None], visual @ model.opt_proj.weight.T + model.opt_proj.bias], dim=1)
    assert torch.allclose(model.encode({"image": images(2)}).soft_prompt, expected, **CLOSE)
    assert [row.part for row in model.parts() if row.trained] == ["opt_proj", "aux_tokens"]


@pytest.mark.parametrize("place, count", [("visual_tokens", 3), ("queries", 1)])
def test_features_may_join_what_the_q_former_reads(build, images, place, count):
    model = build(aux_fusion=place, num_aux_tokens=count).eval()
    features = model.frozen_features({"image": images(2)})
    tokens = (features.pooled @ model.aux_tokens.proj.weight.T + model.aux_tokens.proj.bias).unflatten(-1, (count, -1))
    queries, visual = model.queries(2), features.visual_tokens
    if place == "queries":
        queries = queries + tokens
    else:
        visual = torch.cat([tokens, visual], dim=1)
    expected = model.opt_proj(model.Qformer(query_embeds=queries, encoder_hidden_states=visual).last_hidden_state)
    assert torch.allclose(model.encode({"image": images(2)}).soft_prompt, expected, **CLOSE)
    assert model.num_soft_prompt == len(expected[0])
    maps = model.attention_maps({"image": images(2)})
    assert maps.num_prefix == (count if place == "visual_tokens" else 0)
    assert maps.on_grid(maps.cross[..., maps.num_prefix :]).shape[-1] > 1
    without = model.encode({"image": images(2)}, with_prefix=False).soft_prompt
    assert not torch.allclose(without, expected, **CLOSE)


def test_a_prefix_from_the_encoders_last_map(build, images, tmp_path, monkeypatch):
    monkeypatch.setattr("lavis_kvmod.models.vision.auxiliary.encoder.Folded.__call__", lambda self, network: network)
    model, pooled = build(prefix_source="grid").eval(), build().eval()
    encoder, batch = model.aux_encoder, {"image": images(2)}
    resized = F.interpolate(encoder.renormalise(batch["image"]), size=(64, 64), mode="bilinear", align_corners=False)
    last = encoder.backbone.extract_features(resized)  # (b, 1280, 2, 2)
    features = model.frozen_features(batch).pooled
    assert features.shape == (2, 4, 1280) and torch.equal(features[:, 2], last[:, :, 1, 0])
    assert torch.allclose(features.mean(1), pooled.frozen_features(batch).pooled, atol=1e-5)
    assert model.attention_maps(batch).num_prefix == model.kv_prefix.num_positions == 4
    assert 0 < model.prefix_attention_share(batch) < 1
    coarse = build(prefix_source="grid", prefix_grid=1)
    assert torch.allclose(coarse.frozen_features(batch).pooled, features.mean(1, keepdim=True), atol=1e-5)
    # Remembered features are of one form.
    forms = [one.fingerprint() for one in (model, coarse, pooled)]
    assert len({form["aux_encoder"] for form in forms}) == 3 and len({form["visual_encoder"] for form in forms}) == 1
    # A checkpoint of one is none of the other, whatever the number of tokens.
    for own, other in ((model, build(num_prefix_tokens=4)), (build(num_prefix_tokens=4), model)):
        checkpoints.save({"model": checkpoints.trained_state_dict(own)}, tmp_path / "own.pth")
        with pytest.raises(
            CheckpointError, match=r"own.pth: its prefix is of prefix_source: (grid|pooled), 1 auxiliary"
        ):
            other.load_checkpoint(str(tmp_path / "own.pth"))


def test_several_auxiliary_encoders_stand_side_by_side(build, files, images, tmp_path):
    two = dict(aux_encoder=["efficientnet-b0", "timm:resnet18"], num_prefix_tokens=3)
    import timm

    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "resnet.pth")
    weights = [str(files.b0), str(tmp_path / "resnet.pth")]
    model = build(**two, aux_checkpoint=weights).eval()
    first, batch = build(num_prefix_tokens=3).eval(), {"image": images(2)}
    pooled = model.frozen_features(batch).pooled
    assert pooled.shape == (2, 1280 + 512) and torch.equal(pooled[:, :1280], first.frozen_features(batch).pooled)
    assert model.prefixes(pooled)[0].key.shape[2] == model.attention_maps(batch).num_prefix == 6
    assert "kv_prefix.of.1.k_proj.weight" in model.state_dict() and "kv_prefix.k_proj.weight" in first.state_dict()
    assert "aux_encoder.backbone._conv_stem.weight" in first.state_dict()
    checkpoints.save({"model": checkpoints.trained_state_dict(model)}, tmp_path / "two.pth")
    with pytest.raises(CheckpointError, match="prefix_source: pooled, 2 auxiliary encoders, the model's of .* 1 aux"):
        first.load_checkpoint(str(tmp_path / "two.pth"))
    grid = build(**{**two, "num_prefix_tokens": 8}, aux_checkpoint=weights, prefix_source="grid")
    assert grid.frozen_features(batch).pooled.shape == (2, 4, 1280 + 512) and grid.kv_prefix.num_positions == 8


# As docs/connectors.md has them: connector, its query tokens and the projection behind it, without a second encoder.
FULL_SIZE = {
    "qformer": 107_130_880,
    "linear": 3_607_040,
    "mlp": 10_163_200,
    "perceiver": 146_499_328,
    "c_abstractor": 27_402_848,
    "visual_abstractor": 146_600_688,
}


def test_sizes_of_the_published_models():
    page = (Path(__file__).parents[3] / "docs" / "connectors.md").read_text()
    settings = SimpleNamespace(qformer_geometry={})
    for name, expected in FULL_SIZE.items():
        queries = 32 if name == "qformer" else 64
        with empty_weights():
            made = CONNECTORS[name].build(settings, ConnectorSizes(1408, queries, None, 257, 2560))
            parts = [*made.parameters(), *nn.Linear(made.hidden_size, 2560).parameters()]
        count = sum(p.numel() for p in parts) + queries * made.hidden_size * getattr(made, "reads_queries", True)
        assert count == expected, name
        assert re.search(rf"\| `{name}` \|.* {count / 1e6:.1f} M \|", page), name


@pytest.mark.parametrize(
    "keys, told",
    [
        (dict(connector="perciever"), "connector: expected one of qformer, .*did you mean perceiver"),
        (
            dict(connector="perceiver", connector_geometry=dict(hidden_size=3)),
            "connector_geometry.hidden_size: not a size of connector perceiver; known: depth, .*num_heads",
        ),
        (
            dict(connector="c_abstractor", connector_geometry=dict(depth=0)),
            "connector_geometry.depth: expected a whole number above 0, got 0",
        ),
        (
            dict(connector="mlp", connector_geometry=dict(depth=2)),
            "connector_geometry: connector mlp takes none .*depth",
        ),
        (dict(connector_geometry=dict(depth=2)), "connector qformer takes none .*qformer_geometry"),
        (dict(connector="linear", aux_fusion="prefix"), "aux_fusion: connector linear has no cross-attention"),
        (dict(connector="linear", prefix_gate="tanh"), "prefix_gate: of a prefix, and connector linear .*got tanh"),
        (
            dict(connector="linear", prefix_dropout=0.5),
            "prefix_dropout: of a prefix, .*expected 0.0, the default, got 0.5",
        ),
        (
            dict(connector="mlp", aux_fusion="queries"),
            "mlp has no cross-attention that queries could enter",
        ),
        (dict(aux_fusion="queries", num_aux_tokens=2), "num_aux_tokens: expected 1 or 5, num_query_token, .*got 2"),
        (dict(prefix_dropout=1.0), "prefix_dropout: expected a number from 0, below 1, got 1.0|below 1; got 1.0"),
        (dict(gated_every=2), "gated_every: read with fusion: gated_cross_attention alone"),
        (dict(num_aux_tokens=2), "num_aux_tokens: of tokens, .*as a prefix; expected 1, .*got 2"),
        (dict(prefix_grid=2), "prefix_grid: read with prefix_source: grid alone; expected None, the default, got 2"),
        (
            dict(prefix_source="grid", prefix_grid=3),
            "prefix_grid: expected at most 2, the rows of efficientnet-b0's last map at 64 px, got 3; a larger",
        ),
        (dict(prefix_source="grid", num_prefix_tokens=4), "num_prefix_tokens: of prefix_source: pooled; .*got 4"),
        (dict(prefix_source="grid", connector="linear"), "prefix_source: of a prefix, and connector linear .*got grid"),
        (
            dict(
                prefix_source="grid", aux_encoder="timm:vit_tiny_patch16_224", aux_checkpoint=None, aux_image_size=224
            ),
            "prefix_source: timm:vit_tiny_patch16_224 has no last map to make a grid of; set pooled",
        ),
        (dict(aux_encoder=[]), "aux_encoder: expected a name, or a list of names"),
        (dict(aux_encoder=["efficientnet-b0", "b1"], aux_checkpoint=None), "aux_encoder: expected one of .*got 'b1'"),
        (dict(aux_encoder=["efficientnet-b0"] * 2), "aux_checkpoint: expected a list of 2, one for each aux_encoder"),
        (dict(aux_encoder=3), "aux_encoder: expected text or a list of text, got 3"),
    ],
)
def test_settings_of_another_connector_are_told(model_config, keys, told):
    with pytest.raises(SettingsError, match=told):
        ModelSettings.from_config(model_config(**keys))


def test_how_many_vectors_stand_before_the_text():
    def of(**keys):
        return ModelSettings.from_config(dict(load_finetuned=False, **keys)).num_soft_prompt()

    assert of() == of(connector="perceiver") == 32
    assert of(connector="linear", fusion="gated_cross_attention") == 0
    assert of(connector="linear") == 258 and of(connector="mlp", kv_modulation=False) == 257
    assert of(connector="linear", image_size=490, vit_model="clip_L", num_aux_tokens=3) == 35 * 35 + 4


def test_a_q_formers_checkpoint_gives_another_connector_its_norm(build, files, images, caplog, tmp_path):
    with caplog.at_level(logging.WARNING):
        model = build(connector="perceiver", connector_geometry=dict(depth=1, num_heads=4))
    assert "has a Q-Former, which this model's connector is not" in caplog.text
    stock = torch.load(files.blip2)["model"]
    assert torch.equal(model.ln_vision.weight, stock["ln_vision.weight"])
    assert model.query_tokens.std() < 0.03  # as it starts

    checkpoints.save({"model": checkpoints.trained_state_dict(model)}, tmp_path / "ours.pth")
    with pytest.raises(CheckpointError, match="does not fit the model(.*\n)*.*Qformer.layers.0"):
        build().load_checkpoint(str(tmp_path / "ours.pth"))
    for connector in ("perceiver", "linear"):
        own = build(connector=connector, connector_geometry=dict(num_heads=4) if connector == "perceiver" else {})
        checkpoints.save({"model": checkpoints.trained_state_dict(own)}, tmp_path / f"{connector}.pth")
        with pytest.raises(CheckpointError, match="has another connector than the Q-Former"):
            convert(str(tmp_path / f"{connector}.pth"), str(tmp_path / "folder"), opt=str(files.opt), drop_prefix=True)
