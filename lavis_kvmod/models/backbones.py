"""The frozen towers: the ViT and the OPT language model, from LAVIS's own classes and from local files.

LAVIS's loaders download from fixed addresses; here every source is a key of the config, and nothing is fetched that
a checkpoint would replace.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable, Mapping, NamedTuple, Optional

import torch
from lavis.models import clip_vit, eva_vit
from lavis.models.blip2_models.blip2 import LayerNorm
from lavis.models.blip2_models.modeling_opt import OPTForCausalLM
from torch import nn

from lavis_kvmod.checkpoints import CheckpointError, load_weights, read_weights
from lavis_kvmod.weights import WeightFile

BLIP2_FILES = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


# ---------------------------------------------------------------- image encoder


@dataclass(frozen=True)
class VisionEncoder:
    """How one ``vit_model`` is built and where its weights are."""

    build: Callable[..., nn.Module]
    interpolate: Callable[[nn.Module, dict], None]
    url: Optional[str] = None
    build_weights: Optional[Callable[[], Path]] = None  # instead of an address


def _eva_clip_g(image_size: int, drop_path_rate: float, use_grad_checkpoint: bool, **geometry) -> nn.Module:
    """EVA-CLIP-G without its last block (the geometry of LAVIS's ``create_eva_vit_g``)."""
    defaults = dict(patch_size=14, embed_dim=1408, depth=39, num_heads=16, mlp_ratio=4.3637)
    return eva_vit.VisionTransformer(
        img_size=image_size,
        use_mean_pooling=False,
        qkv_bias=True,
        drop_path_rate=drop_path_rate,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_checkpoint=use_grad_checkpoint,
        **{**defaults, **geometry},
    )


def _clip_l(image_size: int, drop_path_rate: float, use_grad_checkpoint: bool, **geometry):
    """CLIP ViT-L/14 without its last two blocks (the geometry of LAVIS's ``create_clip_vit_L``)."""
    defaults = dict(patch_size=14, width=1024, layers=22, heads=16)
    return clip_vit.VisionTransformer(
        input_resolution=image_size,
        use_grad_checkpointing=use_grad_checkpoint,
        **{**defaults, **geometry},
    )


def _demo_vit(image_size: int, drop_path_rate: float, use_grad_checkpoint: bool, **geometry):
    from lavis_kvmod.demo.vision import build_vision_encoder

    return build_vision_encoder(image_size, **geometry)


def _demo_vision_weights() -> Path:
    from lavis_kvmod.demo import parts

    return parts.vision_weights()


def _demo_language_model() -> Path:
    from lavis_kvmod.demo import parts

    return parts.language_model()


VISION_ENCODERS = {
    "eva_clip_g": VisionEncoder(_eva_clip_g, eva_vit.interpolate_pos_embed, url=f"{BLIP2_FILES}/eva_vit_g.pth"),
    "clip_L": VisionEncoder(_clip_l, clip_vit.interpolate_pos_embed, url=f"{BLIP2_FILES}/clip_vit_L.pth"),
    "demo": VisionEncoder(_demo_vit, eva_vit.interpolate_pos_embed, build_weights=_demo_vision_weights),
}


def vision_weights(name: str, checkpoint: Optional[str] = None) -> WeightFile:
    """Where the weights of ``vit_model: name`` come from."""
    encoder = VISION_ENCODERS[name]
    return WeightFile(
        f"image encoder {name}",
        checkpoint or encoder.url,
        "model.vit_checkpoint",
        build=None if checkpoint else encoder.build_weights,
    )


class Vision(NamedTuple):
    """The ViT, the LayerNorm BLIP-2 puts behind it, and whether the latter's weights were in the ViT's file."""

    visual_encoder: nn.Module
    ln_vision: LayerNorm
    ln_vision_loaded: bool


def build_vision_encoder(
    name: str,
    *,
    checkpoint: Optional[str] = None,
    image_size: int = 224,
    drop_path_rate: float = 0.0,
    use_grad_checkpoint: bool = False,
    precision: str = "fp16",
    geometry: Mapping[str, Any] = (),
) -> Vision:
    """The ViT with its weights, and ``ln_vision``.

    The weight file may hold the bare ViT (LAVIS's EVA file: blocks and heads beyond what BLIP-2 uses are left out),
    or ``visual_encoder.*`` with ``ln_vision.*``.

    Raises:
        MissingWeightsError, CheckpointError: if the weights cannot be had, or do not fit.
    """
    encoder = VISION_ENCODERS[name]
    vit = encoder.build(image_size, drop_path_rate, use_grad_checkpoint, **dict(geometry))
    ln_vision = LayerNorm(vit.num_features)
    path = vision_weights(name, checkpoint).fetch()
    state = read_weights(path)

    norm = {k[len("ln_vision.") :]: v for k, v in state.items() if k.startswith("ln_vision.")}
    if norm:
        load_weights(ln_vision, norm, source=path)
    prefixed = {k[len("visual_encoder.") :]: v for k, v in state.items() if k.startswith("visual_encoder.")}
    state = prefixed or state
    encoder.interpolate(vit, state)
    own = set(vit.state_dict())
    if not own & set(state):
        raise CheckpointError(f"{path} holds no weights of the image encoder {name}")
    load_weights(vit, {k: v for k, v in state.items() if k in own}, source=path)
    cast_vision_encoder(vit, precision)
    return Vision(vit, ln_vision, bool(norm))


def cast_vision_encoder(vit: nn.Module, precision: str) -> None:
    """Store the weights of convolutions and linear layers in ``precision``, as LAVIS does for fp16."""
    if precision == "fp32":
        return
    for module in vit.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(DTYPES[precision])


# ---------------------------------------------------------------- language model


class FrozenOPT(OPTForCausalLM):
    """LAVIS's OPT, frozen, and generating with its Key/Value cache.

    LAVIS's ``prepare_inputs_for_generation`` takes ``past``; transformers 4.26 passes ``past_key_values``, so stock
    LAVIS recomputes the whole sequence at every decoding step.
    """

    def __init__(self, config):
        super().__init__(config)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenOPT":
        """Stay in eval mode whatever ``mode`` says: no dropout in a frozen language model."""
        return super().train(False)

    def prepare_inputs_for_generation(self, input_ids=None, query_embeds=None, past_key_values=None, **kwargs):
        """See the class; arguments as transformers 4.26 gives them."""
        kwargs.setdefault("past", past_key_values)
        return super().prepare_inputs_for_generation(input_ids, query_embeds, **kwargs)


def language_model_weights(name: str) -> WeightFile:
    """Where the language model comes from: a local folder, a Hugging Face name, or the demo's own."""
    return WeightFile(
        "language model",
        name,
        "model.opt_model",
        is_hf_folder=True,
        build=_demo_language_model if name == "demo" else None,
    )


def build_language_model(name: str, *, precision: str = "fp16"):
    """The frozen OPT and its tokenizer, from a Hugging Face name or folder.

    Returns:
        (FrozenOPT, tokenizer)

    Raises:
        MissingWeightsError: if it is neither on disk nor to be downloaded.
    """
    from transformers import AutoTokenizer

    folder = str(language_model_weights(name).fetch())
    tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=False)
    return FrozenOPT.from_pretrained(folder, torch_dtype=DTYPES[precision]), tokenizer
