"""LAVIS's EVA ViT at a geometry that runs in milliseconds."""

from functools import partial

from lavis.models import eva_vit
from torch import nn

SIZE = 28  # image side in pixels: 2 x 2 patches
VIT = dict(patch_size=14, embed_dim=32, depth=2, num_heads=4, mlp_ratio=2.0)


def small_vit():
    return eva_vit.VisionTransformer(
        img_size=SIZE,
        use_mean_pooling=False,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        **VIT,
    )
