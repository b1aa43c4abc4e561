"""What connectors of learned queries share: layers in a row that attend to an image and to the queries."""

from typing import List, Optional, Sequence, Tuple

from torch import Tensor, nn

from lavis_kvmod.models.connectors.kv_prefix import KVPrefix

__all__ = ["require_heads", "resample"]


def resample(
    layers: nn.ModuleList,
    queries: Tensor,
    image: Tensor,
    prefix: Optional[Sequence[KVPrefix]],
    output_attentions: bool,
) -> Tuple[Tensor, Optional[List[Tensor]]]:
    """Queries (b, q, width) through all layers, over an image (b, n, width) and a prefix for each layer, or none.

    Returns:
        Queries (b, q, width); maps (b, h, q, p + n) if asked for, without the columns of the queries themselves, so
        that their rows sum to less than 1.

    Raises:
        ValueError: for another number of prefixes than layers.
    """
    if prefix is not None and len(prefix) != len(layers):
        raise ValueError(f"expected one prefix for each of {len(layers)} cross-attention layers, got {len(prefix)}")
    maps: List[Tensor] = []
    for i, layer in enumerate(layers):
        queries, probs = layer(queries, image, prefix[i] if prefix is not None else None, output_attentions)
        if probs is not None:
            maps.append(probs[..., : -queries.shape[1]])
    return queries, maps or None


def require_heads(name: str, width: int, num_heads: int) -> None:
    """Raises ValueError if ``num_heads`` does not divide the width of the connector ``name``."""
    if width % num_heads:
        raise ValueError(f"connector_geometry.num_heads: expected a divisor of {name}'s width {width}, got {num_heads}")
