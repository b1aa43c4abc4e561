"""The Q-Former's attention, and the three ways in which it meets a Key/Value prefix.

    no prefix       softmax over [        257 visual ]
    one softmax     softmax over [ 8 prefix | 257 visual ]
    gated prefix    softmax over [        257 visual ]  +  tanh(g) · softmax over [ 8 prefix ]

The mask is that of the visual tokens alone: prefix positions are never masked, but for samples that go without
their prefix (`KVPrefix.dropped`).
"""

import math
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from lavis_kvmod.models.connectors.kv_prefix import KVPrefix

__all__ = ["Attended", "attend", "attend_beside_prefix", "attend_gated_prefix", "attend_with"]


class Attended(NamedTuple):
    """What the queries took from the Values (b, h, q, d); and the attention map (b, h, q, n), where asked for."""

    values: Tensor
    probs: Optional[Tensor]


def attend_with(
    prefix: Optional[KVPrefix],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Optional[Tensor] = None,
    *,
    dropout: float = 0.0,
    maps: bool = False,
) -> Attended:
    """Queries (b, h, q, d) attend to Keys and Values (b, h, n, d), in the way that the prefix asks for.

    Args:
        prefix: None, one without a gate, or one with a gate.
        mask: additive, broadcastable to (b, h, q, n); of the Keys alone, not of the prefix.
        dropout: the share of the map that is dropped.
        maps: give the attention map too; without, PyTorch's fused kernels run.
    """
    if prefix is None:
        return attend(q, k, v, mask, dropout=dropout, maps=maps)
    prefix = prefix._replace(key=prefix.key.to(k.dtype), value=prefix.value.to(v.dtype))
    if prefix.gate is None:
        return attend_beside_prefix(prefix, q, k, v, mask, dropout=dropout, maps=maps)
    return attend_gated_prefix(prefix, prefix.gate, q, k, v, mask, dropout=dropout, maps=maps)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor] = None, *, dropout: float = 0.0, maps: bool = False
) -> Attended:
    """No prefix: ``softmax(QKᵀ/√d + mask) V``, as stock BLIP-2.

    keys  [        257 visual ]
    mask  [      as it is given ]
    """
    mask = None if mask is None else mask.to(q.dtype)
    if not maps:
        return Attended(F.scaled_dot_product_attention(q, k, v, mask, dropout), None)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores + mask
    probs = scores.softmax(dim=-1)
    return Attended(F.dropout(probs, dropout) @ v, probs)


def attend_beside_prefix(
    prefix: KVPrefix, q: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor], *, dropout: float, maps: bool
) -> Attended:
    """One softmax over the prefix and the visual tokens (prefix-tuning, arXiv 2101.00190).

    keys  [ 8 prefix | 257 visual ]     (b, h, p + n, d)
    mask  [    0     | as it is given ]
    map   [ p columns | n columns ]     sums to 1 over all
    """
    k = torch.cat([prefix.key, k], dim=2)
    v = torch.cat([prefix.value, v], dim=2)
    if prefix.dropped is not None:
        hidden = torch.zeros_like(prefix.dropped, dtype=q.dtype).masked_fill(prefix.dropped, -torch.inf)
        visual = q.new_zeros(len(hidden), 1, 1, k.shape[2] - prefix.key.shape[2]) if mask is None else mask
        of_prefix = hidden.view(-1, 1, 1, 1).expand(-1, *visual.shape[1:3], prefix.key.shape[2])
        mask = torch.cat([of_prefix, visual.expand(len(hidden), -1, -1, -1)], dim=-1)
    elif mask is not None:
        mask = F.pad(mask, (prefix.key.shape[2], 0), value=0.0)
    return attend(q, k, v, mask, dropout=dropout, maps=maps)


def attend_gated_prefix(
    prefix: KVPrefix,
    gate: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Optional[Tensor],
    *,
    dropout: float,
    maps: bool,
) -> Attended:
    """A softmax of its own for the prefix, added behind a gate: exactly nothing while the gate is 0.

    keys  [ 257 visual ]        + gate ·  [ 8 prefix ]
    mask  [ as it is given ]              [    0     ]
    map   [ gate · p columns | n columns ]     the n columns sum to 1, the p columns to the gate

    ``gate`` (h,) is the opened one, tanh(g) (LLaMA-Adapter, arXiv 2303.16199).
    """
    values, probs = attend(q, k, v, mask, dropout=dropout, maps=maps)
    # Without dropout: it then draws no random numbers, and a model whose gate is still closed trains exactly as one
    # without a prefix, seed for seed.
    added, added_probs = attend(q, prefix.key, prefix.value, maps=maps)
    gate = gate.to(values.dtype).view(1, -1, 1, 1)
    if prefix.dropped is not None:
        gate = gate * ~prefix.dropped.view(-1, 1, 1, 1)
    values = values + gate * added
    if probs is not None and added_probs is not None:
        probs = torch.cat([gate * added_probs, probs], dim=-1)
    return Attended(values, probs)
