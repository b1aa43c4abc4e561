"""Fused kernels against what LAVIS computes step by step: the same to rounding, and the attention map is nowhere."""

import pytest
import torch
from lavis.models import eva_vit
from lavis.models.blip2_models.modeling_opt import OPTConfig, OPTForCausalLM
from torch.utils._python_dispatch import TorchDispatchMode

from lavis_kvmod.models import base
from lavis_kvmod.models.language.opt import FrozenOPT
from lavis_kvmod.models.language.text import caption_batch
from lavis_kvmod.models.vision.attention import FusedAttention, use_fused_attention
from lavis_kvmod.runners.optimizers import adamw, has_fused_adamw


def test_opt_needs_no_mask_where_padding_stands_behind():
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=40, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64
    )
    stock, ours = OPTForCausalLM(config).eval(), FrozenOPT(config)
    ours.load_state_dict(stock.state_dict())
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    found = []
    for given, decoder in (
        ({"attention_mask": mask}, stock.model.decoder),
        ({"is_causal": True}, ours.model.decoder),
        ({"attention_mask": mask}, ours.model.decoder),
    ):
        embedded = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        hidden = decoder(inputs_embeds=embedded, use_cache=False, return_dict=True, **given).last_hidden_state
        (hidden * mask.unsqueeze(-1)).square().sum().backward()
        found.append((hidden[mask.bool()], embedded.grad))
    for other in found[1:]:
        for a, b in zip(found[0], other):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm_first", [True, False], ids=["norm first", "norm behind, as OPT-350m"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_the_last_layer_goes_on_only_where_it_is_read(norm_first, is_packed):
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=40, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64
    )
    config.do_layer_norm_before = norm_first
    opt = FrozenOPT(config)
    read = torch.tensor([3, 0, 17, 12])
    how = {"seen": torch.ones(1, 1, 9, 9).bool().tril(), "position": torch.arange(9)[None]} if is_packed else {}
    asked = []
    handle = opt.model.decoder.layers[-1].fc1.register_forward_hook(lambda _, args, __: asked.append(args[0].shape[0]))
    found = []
    for only in (None, read):
        embedded = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        hidden = opt.model.decoder(inputs_embeds=embedded, is_causal=True, read=only, **how).last_hidden_state
        hidden = hidden.flatten(0, 1)[read] if only is None else hidden
        hidden.square().sum().backward()
        found.append((hidden, embedded.grad))
    handle.remove()
    assert asked == [18, 4]
    for whole, part in zip(*found):
        torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [None, 0.1])
def test_the_vit_attends_as_lavis_does(scale):
    torch.manual_seed(0)
    stock = eva_vit.Attention(32, num_heads=4, qkv_bias=True, qk_scale=scale)
    torch.nn.init.normal_(stock.q_bias)
    x = torch.randn(2, 7, 32)
    expected = stock(x)
    use_fused_attention(stock)
    assert type(stock) is FusedAttention
    torch.testing.assert_close(stock(x), expected, rtol=1e-5, atol=1e-6)


def test_the_image_encoder_is_built_with_it():
    from lavis_kvmod.models.vision.encoders import build_vision_encoder

    vit = build_vision_encoder("eva_clip_g", geometry=dict(embed_dim=32, depth=1, num_heads=2), load=False)
    assert type(vit.visual_encoder.blocks[0].attn) is FusedAttention


def test_adamw_is_fused_where_it_can_be_and_computes_the_same():
    cases = {("cuda",): True, ("cpu",): True, ("cuda", "cpu"): True, ("mps",): False}
    assert {devices: has_fused_adamw(devices, "2.14.1+cu130") for devices in cases} == cases
    assert has_fused_adamw(["cuda"], "2.0.1") and not has_fused_adamw(["cpu"], "2.3.1")
    weights = []
    for make in (adamw, torch.optim.AdamW):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 50))
        optimizer = make([{"params": [weight], "weight_decay": 0.1}], lr=1e-2)
        for i in range(5):
            weight.grad = torch.sin(weight.detach() * (i + 3))
            optimizer.step()
        weights.append(weight.detach())
    assert optimizer.defaults["fused"] is None and torch.allclose(*weights, rtol=0, atol=1e-7)


class Conversions(TorchDispatchMode):
    """Counts conversions between float types, and those of tensors that are a module's weights."""

    def __init__(self, module):
        super().__init__()
        self._weights = {weight.data_ptr() for weight in module.parameters()}
        self.of_weights = self.all = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") not in (None, args[0].dtype):
            self.all += 1
            self.of_weights += args[0].data_ptr() in self._weights
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("opt_precision, converted", [("bf16", False), ("fp32", True)])
def test_an_opt_stored_in_what_is_computed_in_converts_nothing(build, images, opt_precision, converted, monkeypatch):
    """bf16 on the CPU stands for either half precision on a GPU; the numbers are those under autocast."""
    model = build(opt_precision=opt_precision, vit_precision="bf16")
    batch = {"image": images(2), "text_input": ["a photo of two cats", "a dog"]}
    found = []
    for always in (False, True):
        if always:
            monkeypatch.setattr(base, "converts", lambda *_: True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            soft_prompt = model.eval().encode(batch).soft_prompt.detach().requires_grad_()
            text = caption_batch(model.opt_tokenizer, batch["text_input"], "", 32, "cpu")
            with Conversions(model.opt_model) as seen:
                loss = model._language_loss(soft_prompt, text, None)["loss"]
        loss.backward()
        found.append((loss.detach(), soft_prompt.grad, seen))
    torch.testing.assert_close(found[0][:2], found[1][:2], rtol=2e-2, atol=2e-3)
    # Beside the layers: the embedded soft prompt, and the logits into float32.
    assert (found[0][2].of_weights > 0) == converted and (found[0][2].all > 2) == converted
