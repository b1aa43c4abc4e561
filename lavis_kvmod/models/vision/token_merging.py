"""``merge_visual_tokens``: visual tokens that are alike to their mean (ToMe, arXiv 2210.09461).

    a ─┐   b ═══ a'   every second token is of set A, the others of B
    c ─┼─► d          each of A has its likest in B; the likest pairs are merged
    e ─┘   f ═══ e'   until as many tokens are left as asked for

ToMe merges between the layers of the ViT, by the Keys of its attention. Here the ViT's output is merged, in front of
the connector, by the tokens themselves: the frozen encoder, and what is cached of it, stay what they were.
"""

import math
from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["merge_tokens", "merged_number"]


def merge_tokens(tokens: Tensor, keep: int) -> Tuple[Tensor, Tensor]:
    """Visual tokens (m, n, width) to ``keep`` of them (m, keep, width), in their order, and how many each stands for,
    (m, keep) float32. A class token stays by itself.

    Raises:
        ValueError: as `merged_number`.
    """
    merged_number(tokens.shape[1], keep)
    classes, dtype = _class_tokens(tokens.shape[1]), tokens.dtype
    sizes = torch.ones(tokens.shape[:2], device=tokens.device)
    while tokens.shape[1] > keep:
        n = tokens.shape[1]
        most = (n + 1) // 2 - classes  # the tokens of A
        tokens, sizes = _merge(tokens.float(), sizes, min(n - keep, most), classes)
    return tokens.to(dtype), sizes


def merged_number(tokens: int, keep: int) -> int:
    """How many tokens are left of so many: ``keep``.

    Raises:
        ValueError: if there are not so many, or nothing but the class token would be left.
    """
    fewest = 1 + _class_tokens(tokens)
    if not fewest <= keep <= tokens:
        raise ValueError(f"merge_visual_tokens: expected {fewest} to {tokens}, the visual tokens there are, got {keep}")
    return keep


def _class_tokens(tokens: int) -> int:
    """1 if so many are a square and one more."""
    return int(tokens > 1 and math.isqrt(tokens - 1) ** 2 == tokens - 1)


def _merge(tokens: Tensor, sizes: Tensor, count: int, classes: int) -> Tuple[Tensor, Tensor]:
    """One step of bipartite soft matching: tokens (m, n, width) of sizes (m, n) to n - ``count`` of them."""
    m, n = sizes.shape
    unit = F.normalize(tokens, dim=-1)
    likeness = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)  # (m, A, B)
    likeness[:, :classes] = -math.inf
    best, partner = likeness.max(-1)  # (m, A)
    merged = best.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    into = torch.arange(n, device=tokens.device).repeat(m, 1)  # (m, n) the token that each becomes a part of
    into = into.scatter(1, 2 * merged, 2 * partner.gather(1, merged) + 1)
    stays = torch.ones_like(into).scatter(1, 2 * merged, 0)
    place = (stays.cumsum(1) - 1).gather(1, into)
    new_places = torch.arange(n - count, device=tokens.device).unsqueeze(1)
    parts = (place.unsqueeze(1) == new_places) * sizes.unsqueeze(1)  # (m, n - count, n)
    new_sizes = parts.sum(-1)
    return parts @ tokens / new_sizes.unsqueeze(-1), new_sizes
