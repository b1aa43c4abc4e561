"""The demo's ViTs: small, trained on this machine on first use; one is blind to colour, others have seen some."""

from functools import partial
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


def _colour_weights(per_cent: float) -> Path:
    from lavis_kvmod.demo import parts

    return parts.colour_vision_weights(per_cent / 100)


def colour_vit(image_size: int, drop_path_rate: float, **geometry: Any) -> nn.Module:
    """The demo's ViT, pre-trained with a share of coloured pictures (`lavis_kvmod.demo.colour_vision`)."""
    from lavis_kvmod.demo.colour_vision import build_colour_vision_encoder

    return build_colour_vision_encoder(image_size, **geometry)


# In per cent: what studies/dose.yaml gives. A number of one's own wants a line like this one.
for share in (0, 0.03, 0.1, 0.3, 1):
    register_image_encoder(f"demo-colour-{share}", build_weights=partial(_colour_weights, share))(colour_vit)
