"""EVA-CLIP-G (arXiv 2303.15389), the image encoder of BLIP-2."""

from functools import partial
from typing import Any

from lavis.models import eva_vit
from torch import nn

from lavis_kvmod.models.vision.encoders.registry import BLIP2_FILES, register_image_encoder


@register_image_encoder("eva_clip_g", url=f"{BLIP2_FILES}/eva_vit_g.pth")
def eva_clip_g(image_size: int, drop_path_rate: float, **geometry: Any) -> nn.Module:
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
