"""The second, frozen encoder, or several: features of the same image, from which the KV prefix is written."""

from functools import lru_cache
from typing import Optional

import torch
from torch import nn

from lavis_kvmod.models.vision.auxiliary import efficientnet, efficientnet_lite, timm_family
from lavis_kvmod.models.vision.auxiliary.encoder import (
    BLIP_MEAN,
    BLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Auxiliary,
    AuxiliaryEncoder,
    AuxiliaryEncoders,
    Backbone,
    side_by_side,
)
from lavis_kvmod.models.vision.auxiliary.registry import AUXILIARY_ENCODERS, Family, register_auxiliary_encoder
from lavis_kvmod.weights.finding import WeightFile
from lavis_kvmod.weights.reading import load_auxiliary_weights

__all__ = [
    "AUXILIARY_ENCODERS",
    "BLIP_MEAN",
    "BLIP_STD",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Auxiliary",
    "AuxiliaryEncoder",
    "AuxiliaryEncoders",
    "Backbone",
    "auxiliary_weights",
    "build_auxiliary_encoder",
    "efficientnet",
    "efficientnet_lite",
    "map_side",
    "register_auxiliary_encoder",
    "side_by_side",
    "timm_family",
    "untrained_encoder",
]


def auxiliary_weights(name: str, checkpoint: Optional[str] = None) -> WeightFile:
    """Where the weights of ``aux_encoder: name`` come from: ``aux_checkpoint``, or its published weights.

    Raises:
        ValueError: for an unknown encoder, naming the known ones.
        ImportError: if the encoder's package is missing, with the command that installs it.
    """
    family = AUXILIARY_ENCODERS[name]
    return WeightFile(
        part=f"auxiliary encoder {name}",
        source=checkpoint or family.default_file(name),
        key="model.aux_checkpoint",
    )


def map_side(name: str, image_size: int) -> Optional[int]:
    """How many rows the last map of ``aux_encoder: name`` has for an image of this side; None where it has no map.

    Raises:
        ValueError, ImportError: as `auxiliary_weights`.
    """
    return _map_side(AUXILIARY_ENCODERS[name], name, image_size)


@lru_cache(maxsize=None)
def _map_side(family: Family, name: str, image_size: int) -> Optional[int]:
    """By building the network and asking it with a tensor that has only a shape: paddings differ."""
    backbone, image = family.build(name), torch.empty(1, 3, image_size, image_size, device="meta")
    try:
        last = backbone.map_of(backbone.module.to("meta").eval(), image)
    except ValueError:
        return None
    return min(last.shape[-2:])


def build_auxiliary_encoder(
    name: str,
    checkpoint: Optional[str] = None,
    image_size: Optional[int] = None,
    load: bool = True,
    grid: Optional[int] = None,
) -> AuxiliaryEncoder:
    """Build the frozen auxiliary encoder and load its weights.

    Args:
        name: ``efficientnet-b0`` … ``-b7``, ``efficientnet-lite0``, ``timm:NAME``, or one that was registered.
        checkpoint: path or URL of weights; None takes the encoder's published weights.
        image_size, grid: see `AuxiliaryEncoder`.
        load: False leaves its weights random, and looks for no file.

    Raises:
        ValueError: for an unknown encoder, or weights that do not fit (all but the classifier must).
        FileNotFoundError: if the weights can neither be found nor downloaded.
    """
    backbone = AUXILIARY_ENCODERS[name].build(name)
    if load:
        load_auxiliary_weights(backbone.module, auxiliary_weights(name, checkpoint).fetch())
    return AuxiliaryEncoder(backbone, image_size, grid)


def untrained_encoder(name: str, image_size: Optional[int] = None, grid: Optional[int] = None) -> AuxiliaryEncoder:
    """The auxiliary encoder with random weights, always the same ones: what its features are worth without training.

    BatchNorm's statistics are taken from noise, since features of random weights fade to nothing without.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = AUXILIARY_ENCODERS[name].build(name)
        for module in backbone.module.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # the mean of all that is seen, which is one batch
        with torch.no_grad():
            backbone.module.train()(torch.randn(8, 3, 64, 64))
    return AuxiliaryEncoder(backbone, image_size, grid)
