"""``pool_visual_tokens``: neighbouring visual tokens to their mean."""

import math
from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["pool_tokens", "pooled_number"]


def pool_tokens(tokens: Tensor, by: int) -> Tensor:
    """Visual tokens (m, n, width) of a square, each ``by`` x ``by`` neighbours to their mean; a class token stays.

    Raises:
        ValueError: as `pooled_number`.
    """
    classes, side = _square(tokens.shape[1], by)
    grid = tokens[:, classes:].transpose(1, 2).unflatten(2, (side, side))
    pooled = F.avg_pool2d(grid, by).flatten(2).transpose(1, 2)
    return torch.cat([tokens[:, :classes], pooled], dim=1)


def pooled_number(tokens: int, by: int) -> int:
    """How many tokens are left of so many.

    Raises:
        ValueError: if they are no square, with or without a class token, or ``by`` does not divide its side.
    """
    if by == 1:
        return tokens
    classes, side = _square(tokens, by)
    return classes + (side // by) ** 2


def _square(tokens: int, by: int) -> Tuple[int, int]:
    """Class tokens, and the side of the square."""
    for classes in (1, 0):
        side = math.isqrt(tokens - classes)
        if side * side == tokens - classes and side % by == 0:
            return classes, side
    raise ValueError(
        f"pool_visual_tokens: expected visual tokens in a square whose side {by} divides, got {tokens} tokens"
    )
