"""The image encoder: LAVIS's ViTs (EVA-CLIP-G, CLIP-L) and the demo's, with their weights from local files.

LAVIS's loaders download from fixed addresses; here every source is a key of the config, and nothing is fetched that
a checkpoint would replace.
"""

import operator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Mapping, NamedTuple, Optional

from lavis.models import clip_vit, eva_vit
from lavis.models.blip2_models.blip2 import LayerNorm
from torch import Tensor, nn

from lavis_kvmod.models.empty import empty_weights
from lavis_kvmod.models.grad_checkpoint import recompute_in_backward
from lavis_kvmod.system.precision import DTYPES
from lavis_kvmod.weights.files import CheckpointError
from lavis_kvmod.weights.finding import WeightFile
from lavis_kvmod.weights.reading import load_weights, read_weights

BLIP2_FILES = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2"


@dataclass(frozen=True)
class VisionEncoder:
    """How one ``vit_model`` is built and where its weights are."""

    build: Callable[..., nn.Module]
    blocks: Callable[[nn.Module], Iterable[nn.Module]] = operator.attrgetter("blocks")
    url: Optional[str] = None
    build_weights: Optional[Callable[[], Path]] = None  # instead of an address


def _eva_clip_g(image_size: int, drop_path_rate: float, **geometry) -> nn.Module:
    """EVA-CLIP-G without its last block (the geometry of LAVIS's ``create_eva_vit_g``)."""
    defaults = dict(patch_size=14, embed_dim=1408, depth=39, num_heads=16, mlp_ratio=4.3637)
    return eva_vit.VisionTransformer(
        img_size=image_size,
        use_mean_pooling=False,
        qkv_bias=True,
        drop_path_rate=drop_path_rate,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        **{**defaults, **geometry},
    )


def _clip_l(image_size: int, drop_path_rate: float, **geometry):
    """CLIP ViT-L/14 without its last two blocks (the geometry of LAVIS's ``create_clip_vit_L``)."""
    defaults = dict(patch_size=14, width=1024, layers=22, heads=16)
    return clip_vit.VisionTransformer(
        input_resolution=image_size,
        use_grad_checkpointing=False,
        **{**defaults, **geometry},
    )


def _demo_vit(image_size: int, drop_path_rate: float, **geometry):
    from lavis_kvmod.demo.vision import build_vision_encoder

    return build_vision_encoder(image_size, **geometry)


def _demo_vision_weights() -> Path:
    from lavis_kvmod.demo import parts

    return parts.vision_weights()


VISION_ENCODERS = {
    "eva_clip_g": VisionEncoder(_eva_clip_g, url=f"{BLIP2_FILES}/eva_vit_g.pth"),
    "clip_L": VisionEncoder(
        _clip_l,
        blocks=operator.attrgetter("transformer.resblocks"),
        url=f"{BLIP2_FILES}/clip_vit_L.pth",
    ),
    "demo": VisionEncoder(_demo_vit, build_weights=_demo_vision_weights),
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


def interpolate_positions(vit: nn.Module, state: Dict[str, Tensor]) -> None:
    """Bring the position embedding in ``state`` (the ViT's names), if there is one, to the image size of ``vit``."""
    module = clip_vit if isinstance(vit, clip_vit.VisionTransformer) else eva_vit
    module.interpolate_pos_embed(vit, state)


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
    load: bool = True,
) -> Vision:
    """The ViT with its weights, and ``ln_vision``.

    The weight file may hold the bare ViT (LAVIS's EVA file: blocks and heads beyond what BLIP-2 uses are left out),
    or ``visual_encoder.*`` with ``ln_vision.*``. Weights of convolutions and linear layers are stored in
    ``precision``, the others in float32, as LAVIS does for fp16. With ``load=False`` the ViT has no weights (``meta``
    device) and no file is looked for.

    Raises:
        MissingWeightsError, CheckpointError: if the weights cannot be had, or do not fit.
    """
    encoder = VISION_ENCODERS[name]
    with empty_weights():
        vit = encoder.build(image_size, drop_path_rate, **dict(geometry))
    if use_grad_checkpoint:
        recompute_in_backward(encoder.blocks(vit))
    for module in vit.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(DTYPES[precision])
    ln_vision = LayerNorm(vit.num_features)
    if not load:
        return Vision(vit, ln_vision, False)

    path = vision_weights(name, checkpoint).fetch()
    state = read_weights(path)
    norm = {k[len("ln_vision.") :]: v for k, v in state.items() if k.startswith("ln_vision.")}
    if norm:
        load_weights(ln_vision, norm, source=path)
    prefixed = {k[len("visual_encoder.") :]: v for k, v in state.items() if k.startswith("visual_encoder.")}
    state = prefixed or state
    interpolate_positions(vit, state)
    own = set(vit.state_dict())
    if not own & set(state):
        raise CheckpointError(f"{path} holds no weights of the image encoder {name}")
    load_weights(vit, {k: v for k, v in state.items() if k in own}, source=path, assign=True)
    return Vision(vit, ln_vision, bool(norm))
