"""Connectors against their public implementations in Hugging Face's current transformers, on the same weights.

    python benchmarks/parity_connectors.py .venv-parity/bin/python

LLaVA-1.5's projector (`LlavaMultiModalProjector`), Idefics' Perceiver Resampler and its gated cross-attention layer. As
in `parity_hf.py` the other side runs in an environment of its own, and the two exchange files: weights under its names,
inputs, outputs. Idefics differs from Flamingo's paper in two things, which the other side puts back: its Perceiver has
a ReLU where Flamingo squares it, and its gated layer has Llama's norm and feed-forward. Honeybee's C-Abstractor is not
in transformers: it stands against an arithmetic of its own in tests/models/connectors/test_connectors.py.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Dict, Tuple

import torch
from parity_hf import hf_side
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lavis_kvmod.models.connectors.perceiver import Perceiver
from lavis_kvmod.models.connectors.projectors import Projector
from lavis_kvmod.models.language.gated_cross_attention import GatedLayer

LIMIT = 1e-5
SIDE = Path(__file__).with_name("parity_connectors_side.py")
IMAGE, TEXT, HEADS, DEPTH, LATENTS = 24, 32, 4, 2, 5

LLAVA = {"proj.": "linear_1.", "opt_proj.": "linear_2."}
_BLOCK = {
    "norm_image.": "0.context_layer_norm.",
    "norm_latents.": "0.latents_layer_norm.",
    "attention.query.": "0.q_proj.",
    "attention.key.": "0.k_proj.",
    "attention.value.": "0.v_proj.",
    "out_proj.": "0.output_proj.",
    "feed_forward.0.": "1.ln.",
    "feed_forward.1.": "1.fc.",
    "feed_forward.3.": "1.c_proj.",
}
PERCEIVER = {f"layers.{i}.{ours}": f"blocks.{i}.{theirs}" for i in range(DEPTH) for ours, theirs in _BLOCK.items()}
PERCEIVER["norm."] = "layer_norm."
GATED = {
    "norm.": "input_layernorm.",
    "attention.query.": "cross_attn.q_proj.",
    "attention.key.": "cross_attn.k_proj.",
    "attention.value.": "cross_attn.v_proj.",
    "out_proj.": "cross_attn.o_proj.",
    "attention_gate": "alpha_cross_attn",
    "feed_forward.0.": "post_attention_layernorm.",
    "feed_forward.1.": "mlp.0.",
    "feed_forward.3.": "mlp.2.",
    "feed_forward_gate": "alpha_dense",
}


def main() -> int:
    """Compare, report, and return 1 if one of them differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hf_python", help="a Python that has a current transformers")
    hf_python = parser.parse_args().hf_python
    torch.manual_seed(0)
    passed = True
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        work = Path(temporary)
        made = {"llava": llava(), "perceiver": perceiver(), "gated": gated()}
        for name, (weights, inputs, _) in made.items():
            save_file({key: value.contiguous() for key, value in weights.items()}, work / f"{name}.safetensors")
            save_file({key: value.contiguous() for key, value in inputs.items()}, work / f"{name}_in.safetensors")
        hf_side(hf_python, work, script=SIDE)
        print(f"{'float32, largest difference':34} of outputs up to")
        for name, (_, _, ours) in made.items():
            theirs = load_file(work / f"{name}_out.safetensors")["out"]
            difference = (ours - theirs).abs().max().item()
            passed = passed and ours.shape == theirs.shape and difference <= LIMIT
            print(f"{name:12} {difference:21.1e} {ours.abs().max().item():18.1f}")
    print(f"{'passed' if passed else 'FAILED'} ({LIMIT:.0e} is allowed)")
    return 0 if passed else 1


Made = Tuple[Dict[str, Tensor], Dict[str, Tensor], Tensor]


def llava() -> Made:
    """Its weights under the other side's names, an input, and the output."""
    module = nn.ModuleDict(
        {
            "connector": Projector(visual_width=IMAGE, num_visual_tokens=9, hidden_size=TEXT),
            "opt_proj": nn.Linear(TEXT, TEXT),
        }
    )
    shake(module)
    image = torch.randn(2, 9, IMAGE)
    out = module["opt_proj"](module["connector"](None, image).last_hidden_state)
    state = {key.replace("connector.", ""): value for key, value in module.state_dict().items()}
    return renamed(state, LLAVA), {"image": image}, out


def perceiver() -> Made:
    """As `llava`; the time embedding of its one frame is added on this side."""
    module = Perceiver(width=TEXT, num_queries=LATENTS, depth=DEPTH, num_heads=HEADS)
    shake(module)
    latents, image = torch.randn(LATENTS, TEXT), torch.randn(2, 9, TEXT)
    out = module(latents.expand(2, -1, -1), image).last_hidden_state
    state = {key: value for key, value in module.state_dict().items() if key != "time_embeddings"}
    weights = {**renamed(state, PERCEIVER), "latents": latents}
    return weights, {"image": image + module.time_embeddings[0]}, out


def gated() -> Made:
    """As `llava`, with open gates."""
    module = GatedLayer(width=TEXT, image_width=IMAGE, num_heads=HEADS)
    shake(module)
    text, image = torch.randn(2, 7, TEXT), torch.randn(2, 9, IMAGE)
    return renamed(module.state_dict(), GATED), {"text": text, "image": image}, module(text, image)


def shake(module: nn.Module) -> None:
    """Away from where they start: norms, gates and zeros too."""
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)


def renamed(state: Dict[str, Tensor], names: Dict[str, str]) -> Dict[str, Tensor]:
    """Every key begins with one of these names."""
    found = {}
    for key, value in state.items():
        (ours,) = [name for name in names if key.startswith(name)]
        found[names[ours] + key[len(ours) :]] = value
    return found


if __name__ == "__main__":
    sys.exit(main())
