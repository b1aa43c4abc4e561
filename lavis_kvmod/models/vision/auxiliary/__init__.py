"""The second, frozen encoder: pooled features of the same image, from which the KV prefix is written."""

from typing import Optional

import torch
from torch import nn

from lavis_kvmod.models.vision.auxiliary import efficientnet, efficientnet_lite, timm_family
from lavis_kvmod.models.vision.auxiliary.encoder import (
    BLIP_MEAN,
    BLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    AuxiliaryEncoder,
    Backbone,
)
from lavis_kvmod.models.vision.auxiliary.registry import AUXILIARY_ENCODERS, register_auxiliary_encoder
from lavis_kvmod.weights.finding import WeightFile
from lavis_kvmod.weights.reading import load_auxiliary_weights

__all__ = [
    "AUXILIARY_ENCODERS",
    "BLIP_MEAN",
    "BLIP_STD",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "AuxiliaryEncoder",
    "Backbone",
    "auxiliary_weights",
    "build_auxiliary_encoder",
    "efficientnet",
    "efficientnet_lite",
    "register_auxiliary_encoder",
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


def build_auxiliary_encoder(
    name: str, checkpoint: Optional[str] = None, image_size: Optional[int] = None, load: bool = True
) -> AuxiliaryEncoder:
    """Build the frozen auxiliary encoder and load its weights.

    Args:
        name: ``efficientnet-b0`` … ``-b7``, ``efficientnet-lite0``, ``timm:NAME``, or one that was registered.
        checkpoint: path or URL of weights; None takes the encoder's published weights.
        image_size: see `AuxiliaryEncoder`.
        load: False leaves its weights random, and looks for no file.

    Raises:
        ValueError: for an unknown encoder, or weights that do not fit (all but the classifier must).
        FileNotFoundError: if the weights can neither be found nor downloaded.
    """
    backbone = AUXILIARY_ENCODERS[name].build(name)
    if load:
        load_auxiliary_weights(backbone.module, auxiliary_weights(name, checkpoint).fetch())
    return AuxiliaryEncoder(backbone, image_size)


def untrained_encoder(name: str, image_size: Optional[int] = None) -> AuxiliaryEncoder:
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
    return AuxiliaryEncoder(backbone, image_size)
