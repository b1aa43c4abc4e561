"""From visual tokens to a soft prompt, one file a connector; and the Key/Value prefix that some of them attend to."""

from lavis_kvmod.models.connectors import c_abstractor, perceiver, projectors, qformer, visual_abstractor
from lavis_kvmod.models.connectors.registry import CONNECTORS, ConnectorSizes, register_connector

__all__ = [
    "CONNECTORS",
    "ConnectorSizes",
    "c_abstractor",
    "perceiver",
    "projectors",
    "qformer",
    "register_connector",
    "visual_abstractor",
]
