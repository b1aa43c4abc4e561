"""Texts about one image in one row of the language model, behind one soft prompt.

    a row for each text:     [soft prompt | question 1, answer]        [soft prompt | question 2, answer]
    packed:                  [soft prompt | question 1, answer | question 2, answer | …]

A text sees the soft prompt and what stands before in itself, nothing of the others, and its positions count on from the
soft prompt: so each token is predicted from what it would be predicted from alone. What is saved is the soft prompt's
way through the language model, for every text but one.
"""

from typing import Dict, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["Packing", "pack", "packing_pays"]

# What packing must save of the language model's work: it needs an explicit mask, which costs something itself.
_WORTH = 0.1


class Packing(NamedTuple):
    """Where the tokens of texts (b, t) stand in rows of q soft-prompt vectors and s tokens, a row for each of i images.

    Attributes:
        token: (i, s), which of the b * t tokens stands there; any where none does.
        position: (i, q + s), the numbers that the language model counts positions by.
        seen: (i, 1, q + s, q + s), true where a position (third) sees another (last).
        predicted_at: (b, t), at which of the i * (q + s) positions each token is predicted.
    """

    token: Tensor
    position: Tensor
    seen: Tensor
    predicted_at: Tensor


def packing_pays(image_of: Sequence[int], lengths: Sequence[int], num_soft: int, width: int) -> bool:
    """Whether the language model has clearly less to do if texts of these ``lengths`` share their images' soft prompts.

    Args:
        image_of: for each text, its image.
        lengths: tokens of each text.
        num_soft: vectors of a soft prompt.
        width: of the language model, next to which attention's share of the work is what a row's length is.
    """
    of_image: Dict[int, int] = {}
    for image, length in zip(image_of, lengths):
        of_image[image] = of_image.get(image, 0) + length
    # A layer's matrices cost 24 * width² operations a position, attention 4 * width for each position that is seen;
    # a causal kernel leaves out the half that is not, an explicit mask does not.
    apart, together = num_soft + max(lengths), num_soft + max(of_image.values())
    alone = len(lengths) * apart * (6 * width + apart / 2)
    packed = len(of_image) * together * (6 * width + together)
    return packed < (1 - _WORTH) * alone


def pack(
    image_of: Sequence[int],
    lengths: Sequence[int],
    *,
    num_images: int,
    num_soft: int,
    columns: int,
    device: torch.device,
) -> Packing:
    """Put texts, whose ids are (b, ``columns``), behind the soft prompts of ``num_images`` images, in their order."""
    filled = [0] * num_images
    starts = []
    for image, length in zip(image_of, lengths):
        starts.append(num_soft + filled[image])
        filled[image] += length
    row = num_soft + max(filled)
    # By NumPy: thousands of small steps, which PyTorch takes ten times as long for.
    token = np.zeros((num_images, row), dtype=np.int64)
    # Behind the last text any position will do that the language model has, however long the row.
    position = np.zeros((num_images, row), dtype=np.int64)
    position[:, :num_soft] = np.arange(num_soft)
    text = np.full((num_images, row), -1)  # which text a position belongs to: 0 the soft prompt's, -1 to none
    text[:, :num_soft] = 0
    predicted_at = np.tile(np.arange(columns) - 1, (len(lengths), 1))
    for n, (image, start, length) in enumerate(zip(image_of, starts, lengths)):
        place = slice(start, start + length)
        token[image, place] = np.arange(n * columns, n * columns + length)
        position[image, place] = np.arange(num_soft, num_soft + length)
        text[image, place] = n + 1
        predicted_at[n] += image * row + start
        predicted_at[n, 0] = image * row + num_soft - 1
    of_text, where, positions, predicted = (
        torch.from_numpy(each).to(device, non_blocking=True)
        for each in (text, token[:, num_soft:], position, predicted_at)
    )
    of_same = of_text.unsqueeze(2) == of_text.unsqueeze(1)
    before = torch.ones(row, row, dtype=torch.bool, device=device).tril()
    seen = before & (of_same | (of_text == 0).unsqueeze(1))
    return Packing(where, positions, seen.unsqueeze(1), predicted)
