"""From visual tokens to a soft prompt: the Q-Former, and the Key/Value prefix it attends to."""

from lavis_kvmod.models.connectors import qformer
from lavis_kvmod.models.connectors.registry import CONNECTORS, ConnectorSizes, register_connector

__all__ = ["CONNECTORS", "ConnectorSizes", "qformer", "register_connector"]
