"""Samples that show the same image: several questions, or captions, each.

A data set that can tell has two methods beside ``__getitem__``. ``image_of(index)`` is what its image is known by,
without reading it. ``sample(index, views)`` is the sample there, with what was seen of its image taken from ``views``
(by ``image_of``) or put there. Concatenations of such sets can, too.
"""

from bisect import bisect_right
from typing import Any, Dict, Hashable, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch.utils.data import ConcatDataset

__all__ = ["Views", "each_image_once", "first_with_same_image", "one_of_each_image"]


def first_with_same_image(dataset: Any) -> Optional[np.ndarray]:
    """For each sample the first one that shows the same image, (n,) int64; None where no two are known to."""
    first: Dict[Tuple[int, Hashable], int] = {}
    found = np.arange(len(dataset))
    start = 0
    for number, part in enumerate(_parts(dataset)):
        if hasattr(part, "image_of"):
            for index in range(len(part)):
                found[start + index] = first.setdefault((number, part.image_of(index)), start + index)
        start += len(part)
    return found if (found != np.arange(len(found))).any() else None


def one_of_each_image(dataset: Any) -> List[int]:
    """The samples that show an image for the first time: all of them where no two are known to share one."""
    first = first_with_same_image(dataset)
    return list(range(len(dataset))) if first is None else sorted(set(first.tolist()))


class Views:
    """What was seen of images so far, for one batch."""

    def __init__(self) -> None:
        self._by_part: Dict[int, Dict[Hashable, Any]] = {}

    def sample(self, dataset: Any, index: int) -> Dict[str, Any]:
        """A sample, whose image is the same object as that of others that show it."""
        parts = _parts(dataset)
        ends = np.cumsum([len(part) for part in parts]).tolist()
        number = bisect_right(ends, index)
        part, own = parts[number], index - (ends[number - 1] if number else 0)
        if not hasattr(part, "image_of"):
            return part[own]
        return part.sample(own, self._by_part.setdefault(number, {}))


def each_image_once(batch: Dict[str, Any], samples: Sequence[Dict[str, Any]]) -> Dict[str, Any]:
    """A collated batch, with the images that its samples share once: see `SampleSource`."""
    numbers: Dict[int, int] = {}
    index = [numbers.setdefault(id(sample["image"]), len(numbers)) for sample in samples]
    firsts = [index.index(number) for number in range(len(numbers))]
    of_images: Dict[str, Any] = {
        key: batch[key][firsts] for key in ("image", "image_mask", "image_place") if key in batch
    }
    of_images["image_index"] = torch.tensor(index)
    if "image_key" in batch:
        of_images["image_key"] = [batch["image_key"][first] for first in firsts]
    return {**batch, **of_images}


def _parts(dataset: Any) -> List[Any]:
    return list(dataset.datasets) if isinstance(dataset, ConcatDataset) else [dataset]
