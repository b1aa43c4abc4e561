"""CLIP ViT-L/14 (arXiv 2103.00020), LAVIS's other choice for BLIP-2."""

import operator
from typing import Any

from lavis.models import clip_vit
from torch import nn

from lavis_kvmod.models.vision.encoders.registry import BLIP2_FILES, register_image_encoder


@register_image_encoder(
    "clip_L", url=f"{BLIP2_FILES}/clip_vit_L.pth", blocks=operator.attrgetter("transformer.resblocks")
)
def clip_l(image_size: int, drop_path_rate: float, **geometry: Any) -> nn.Module:
    """CLIP ViT-L/14 without its last two blocks (the geometry of LAVIS's ``create_clip_vit_L``)."""
    defaults = dict(patch_size=14, width=1024, layers=22, heads=16)
    return clip_vit.VisionTransformer(
        input_resolution=image_size,
        use_grad_checkpointing=False,
        **{**defaults, **geometry},
    )
