"""The demo's ViT: small, blind to colour, trained on this machine on first use."""

from pathlib import Path
from typing import Any

from torch import nn

from lavis_kvmod.models.vision.encoders.registry import register_image_encoder


def _weights() -> Path:
    from lavis_kvmod.demo import parts

    return parts.vision_weights()


@register_image_encoder("demo", build_weights=_weights)
def demo_vit(image_size: int, drop_path_rate: float, **geometry: Any) -> nn.Module:
    """A small ViT that is blind to colour (`lavis_kvmod.demo.vision`)."""
    from lavis_kvmod.demo.vision import build_vision_encoder

    return build_vision_encoder(image_size, **geometry)
