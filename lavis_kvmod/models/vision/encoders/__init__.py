"""The first encoder: the image to visual tokens. One file a family; `building` makes one with its weights."""

from lavis_kvmod.models.vision.encoders import clip, demo, eva
from lavis_kvmod.models.vision.encoders.building import (
    Vision,
    build_vision_encoder,
    interpolate_positions,
    known_num_tokens,
    vision_weights,
)
from lavis_kvmod.models.vision.encoders.registry import VISION_ENCODERS, register_image_encoder

__all__ = [
    "VISION_ENCODERS",
    "Vision",
    "build_vision_encoder",
    "clip",
    "demo",
    "eva",
    "interpolate_positions",
    "known_num_tokens",
    "register_image_encoder",
    "vision_weights",
]
