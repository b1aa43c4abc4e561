"""Every member of the family does all that a member does: a new one is one line in `MEMBERS`.

The members are a covering subset: each two values of gate, sharing, image encoder, precision and freezing meet; then
each connector.
"""

from types import SimpleNamespace

import pytest
import torch

from lavis_kvmod import Blip2OPTKVMod
from lavis_kvmod.commands.convert import convert
from lavis_kvmod.models import build as building
from lavis_kvmod.models.settings import ModelSettings
from lavis_kvmod.models.vision.encoders import VISION_ENCODERS
from lavis_kvmod.weights import files as checkpoints

SIZE = 28
GEOMETRY = {
    "eva_clip_g": dict(patch_size=14, embed_dim=32, depth=2, num_heads=4, mlp_ratio=2.0),
    "clip_L": dict(patch_size=14, width=32, layers=2, heads=4),
    "demo": dict(patch_size=14, embed_dim=32, depth=2, num_heads=4, mlp_ratio=2.0),
}

SMALL = dict(depth=2, num_heads=4)


TWO = ["efficientnet-b0", "efficientnet-b0"]


def member(vit, gate, sharing, precision, freeze, connector="qformer", **more):
    keys = dict(prefix_gate=gate, prefix_sharing=sharing, freeze_vit=freeze == "frozen", connector=connector, **more)
    if keys.get("fusion") == "gated_cross_attention":
        keys.setdefault("gated_every", 1)
    keys.update(vit_model=vit, vit_precision=precision, opt_precision=precision, vit_geometry=GEOMETRY[vit])
    name = "-".join([vit, gate, sharing, precision, freeze, connector, *more])
    return pytest.param(keys, id=name)


MEMBERS = [
    member("eva_clip_g", "none", "shared", "fp32", "frozen"),
    member("clip_L", "tanh", "per_layer", "fp32", "frozen"),
    member("demo", "none", "per_layer", "fp32", "trained"),
    member("eva_clip_g", "tanh", "per_layer", "bf16", "trained"),
    member("clip_L", "none", "shared", "bf16", "trained"),
    member("demo", "tanh", "shared", "bf16", "frozen"),
    member("eva_clip_g", "none", "shared", "bf16", "frozen", kv_modulation=False),
    member("eva_clip_g", "none", "shared", "fp32", "frozen", "linear"),
    member("clip_L", "none", "shared", "bf16", "frozen", "mlp", num_aux_tokens=2),
    member("demo", "tanh", "per_layer", "fp32", "frozen", "perceiver", connector_geometry=SMALL),
    member("eva_clip_g", "none", "shared", "bf16", "trained", "c_abstractor", connector_geometry=dict(hidden_size=16)),
    member("demo", "none", "per_layer", "bf16", "frozen", "visual_abstractor", connector_geometry=SMALL),
    member("demo", "none", "shared", "fp32", "frozen", "linear", kv_modulation=False),
    member("demo", "none", "shared", "fp32", "frozen", aux_fusion="tokens"),
    member("clip_L", "tanh", "shared", "bf16", "frozen", fusion="gated_cross_attention", gated_every=1),
    member("demo", "none", "shared", "fp32", "frozen", "linear", fusion="gated_cross_attention", gated_every=2),
    member("demo", "none", "per_layer", "fp32", "frozen", prefix_source="grid", prefix_grid=2),
    member("clip_L", "tanh", "shared", "bf16", "frozen", "linear", fusion="gated_cross_attention", aux_encoder=TWO),
    member("eva_clip_g", "none", "shared", "bf16", "frozen", "mlp", merge_visual_tokens=3),
    member("eva_clip_g", "none", "shared", "bf16", "frozen", qformer_text_input=True, bert_model="demo"),
]


@pytest.fixture(scope="module")
def vit_file(tmp_path_factory):
    """A function: the file of an image encoder, with the LayerNorm behind it."""
    folder = tmp_path_factory.mktemp("vits")

    def of(name):
        torch.manual_seed(0)
        vit = VISION_ENCODERS[name].build(SIZE, 0.0, **GEOMETRY[name])
        with torch.no_grad():
            state = {f"visual_encoder.{k}": torch.randn_like(v) * 0.1 for k, v in vit.state_dict().items()}
        state.update({"ln_vision.weight": torch.ones(32), "ln_vision.bias": torch.zeros(32)})
        torch.save(state, folder / f"{name}.pth")
        return str(folder / f"{name}.pth")

    return of


@pytest.fixture(scope="class", params=MEMBERS)
def family(request, model_config, vit_file, files):
    """A function that builds the member from a seed, and the one of seed 0."""
    keys = {"pretrained": None, "vit_checkpoint": vit_file(request.param["vit_model"]), **request.param}
    if keys.get("aux_encoder") == TWO:
        keys["aux_checkpoint"] = [str(files.b0)] * 2

    def make(seed):
        torch.manual_seed(seed)
        settings = ModelSettings.from_config(model_config(**keys))
        model = Blip2OPTKVMod(**building.opt_arguments(settings))
        if model.kv_gate is not None:
            torch.nn.init.constant_(model.kv_gate, 0.3)
        if model.gated_layers is not None:
            for layer in model.gated_layers.layers:
                torch.nn.init.constant_(layer.attention_gate, 0.3)
                torch.nn.init.constant_(layer.feed_forward_gate, -0.3)
            if model.gated_layers.kv_gate is not None:
                torch.nn.init.constant_(model.gated_layers.kv_gate, 0.3)
        return model.eval()

    return SimpleNamespace(make=make, model=make(0))


class TestMember:
    """One member of the family."""

    def test_forward_and_backward(self, family, vqa_batch):
        model = family.model
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        loss = model({**vqa_batch})["loss"]
        assert loss.isfinite() and loss.ndim == 0
        loss.backward()
        try:
            assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
            assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
            assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        finally:
            model.zero_grad()
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())

    def test_trained_and_frozen(self, family):
        model = family.model.train()
        asleep = [part for part in ("visual_encoder", "ln_vision", "aux_encoder", "opt_model") if part_of(model, part)]
        for name in asleep:
            is_trained = name in model.trained_parts
            assert all(p.requires_grad == is_trained for p in getattr(model, name).parameters())
            assert getattr(model, name).training == is_trained
        model.eval()
        groups = model.get_optimizer_params(weight_decay=0.05)
        assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in model.parameters())

    def test_save_and_load(self, family, images, tmp_path):
        checkpoints.save({"model": checkpoints.trained_state_dict(family.model)}, tmp_path / "ours.pth")
        self._loads(family, images, tmp_path / "ours.pth")

    def test_convert(self, family, images, tmp_path):
        checkpoints.save({"model": checkpoints.trained_state_dict(family.model)}, tmp_path / "ours.pth")
        convert(str(tmp_path / "ours.pth"), str(tmp_path / "ours.safetensors"))
        self._loads(family, images, tmp_path / "ours.safetensors")

    @staticmethod
    def _loads(family, images, path):
        again, batch = family.make(1), {"image": images(2)}
        expected = family.model.encode(batch).soft_prompt
        assert not torch.allclose(again.encode(batch).soft_prompt, expected, atol=1e-3)
        report = again.load_checkpoint(str(path))
        assert not set(report.missing_keys) & set(checkpoints.trained_state_dict(again))
        assert torch.equal(again.encode(batch).soft_prompt, expected)

    def test_generate(self, family, images):
        for search in (dict(num_beams=1), dict(num_beams=3), dict(use_nucleus_sampling=True, num_captions=2)):
            texts = family.model.generate({"image": images(2), "prompt": "a photo of"}, max_length=4, **search)
            assert len(texts) == 2 * search.get("num_captions", 1) and all(isinstance(text, str) for text in texts)

    def test_answer_and_rank(self, family, images):
        batch = {"image": images(2), "text_input": ["which digit is written", "is it even"]}
        assert len(family.model.predict_answers(batch, prompt="Question: {} Short answer:", max_len=4)) == 2
        candidates = ["seven", "red", "yes"]
        ranked = family.model.predict_answers(batch, inference_method="rank", answer_list=candidates)
        assert len(ranked) == 2 and set(ranked) <= set(candidates)

    def test_features(self, family, images):
        features = family.model.extract_features({"image": images(2)})
        model = family.model
        assert features.image_embeds.shape == (2, model.num_outputs, model.Qformer.hidden_size)
        if model.gated_layers is None:
            assert features.image_embeds_proj.shape == (2, model.num_soft_prompt, 32)
        else:
            assert features.image_embeds_proj is None and model.num_soft_prompt == 0
            assert model.gated_layers.kv_prefix is not None
        share = family.model.prefix_attention_share({"image": images(2)})
        assert share is None if family.model.kv_prefix is None else 0 < share < 1


def part_of(model, name):
    return getattr(model, name) is not None
