"""The Hugging Face half of `parity_connectors.py`, run where transformers is a current one; knows nothing of ours.

python parity_connectors_side.py WORK    the outputs for the weights and inputs in WORK
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import IdeficsConfig, LlavaConfig, logging
from transformers.activations import ACT2FN
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

HEADS = 4


def llava(weights: dict, given: dict) -> torch.Tensor:
    """LLaVA-1.5's projector, as published."""
    text, image = weights["linear_1.weight"].shape
    config = LlavaConfig(
        vision_config=dict(model_type="clip_vision_model", hidden_size=image),
        text_config=dict(model_type="llama", hidden_size=text),
    )
    return loaded(LlavaMultiModalProjector(config), weights)(given["image"])


def perceiver(weights: dict, given: dict) -> torch.Tensor:
    """Idefics' Perceiver, with Flamingo's squared ReLU."""
    latents, width = weights["latents"].shape
    depth = len([name for name in weights if name.endswith("q_proj.weight")])
    config = IdeficsConfig(vision_config=dict(embed_dim=width), perceiver_config=dict(qk_layer_norms_perceiver=False))
    module = IdeficsPerceiverResampler(config, width, depth, HEADS, width // HEADS, latents)
    for _, feed_forward in module.blocks:
        feed_forward.act = ACT2FN["relu2"]
    return loaded(module, weights)(given["image"])


def gated(weights: dict, given: dict) -> torch.Tensor:
    """Idefics' gated layer, with Flamingo's norms and feed-forward."""
    width, image = weights["cross_attn.k_proj.weight"].shape
    config = IdeficsConfig(
        hidden_size=width,
        num_attention_heads=HEADS,
        alpha_type="float",
        qk_layer_norms=False,
        vision_config=dict(embed_dim=image),
        attn_implementation="eager",
    )
    module = IdeficsGatedCrossAttentionLayer(config, layer_idx=0)
    module.input_layernorm, module.post_attention_layernorm = nn.LayerNorm(width), nn.LayerNorm(width)
    module.mlp = nn.Sequential(
        nn.Linear(width, 4 * width, bias=False), ACT2FN["relu2"], nn.Linear(4 * width, width, bias=False)
    )
    text = given["text"]
    seen = torch.ones(text.shape[:2])
    return loaded(module, weights)(text, image_hidden_states=given["image"], cross_attention_gate=seen)


def loaded(module: nn.Module, weights: dict) -> nn.Module:
    """With all of these weights, and no others."""
    module.load_state_dict(weights)
    return module.eval()


if __name__ == "__main__":
    logging.set_verbosity_error()
    work = Path(sys.argv[1])
    with torch.no_grad():
        for make in (llava, perceiver, gated):
            name = make.__name__
            out = make(load_file(work / f"{name}.safetensors"), load_file(work / f"{name}_in.safetensors"))
            save_file({"out": out.contiguous()}, work / f"{name}_out.safetensors")
