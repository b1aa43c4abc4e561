"""Any network of timm's, as ``timm:NAME``."""

from typing import List, Optional

from lavis_kvmod.models.vision.auxiliary.encoder import Backbone
from lavis_kvmod.models.vision.auxiliary.registry import register_auxiliary_encoder

_PREFIX = "timm:"


def _published(name: str) -> Optional[str]:
    import timm

    # timm 0.4.12 has no public way to ask for a model's default weights without building it.
    return timm.create_model(name[len(_PREFIX) :], pretrained=False).default_cfg.get("url") or None


def _members() -> List[str]:
    import timm

    return timm.list_models()


@register_auxiliary_encoder(_PREFIX, weights=_published, members=_members)
def timm_network(name: str) -> Backbone:
    """Its pooled features, normalised as its own configuration has it."""
    import timm

    module = timm.create_model(name[len(_PREFIX) :], pretrained=False, num_classes=0)
    cfg = module.default_cfg
    return Backbone(module, module.num_features, cfg["mean"], cfg["std"], feature_map="forward_features")
