"""EfficientNet-B0 … B7 (arXiv 1905.11946), of the package ``efficientnet_pytorch``."""

from lavis_kvmod.models.vision.auxiliary.encoder import Backbone
from lavis_kvmod.models.vision.auxiliary.registry import register_auxiliary_encoder


def _published(name: str) -> str:
    from efficientnet_pytorch.utils import url_map

    return url_map[name]


@register_auxiliary_encoder(*(f"efficientnet-b{i}" for i in range(8)), weights=_published)
def efficientnet(name: str) -> Backbone:
    """``efficientnet-b3`` and its like: (b, 3, H, W) -> (b, 1536, 1, 1)."""
    from efficientnet_pytorch import EfficientNet
    from efficientnet_pytorch.utils import round_filters

    module = EfficientNet.from_name(name, include_top=False)
    return Backbone(module, round_filters(1280, module._global_params), feature_map="extract_features")
