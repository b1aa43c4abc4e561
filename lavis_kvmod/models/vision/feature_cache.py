"""Remember what the frozen encoders said of an image, so that later epochs skip them."""

from typing import Callable, Dict, List, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

# Images are encoded so many at a time, the last ones with copies of one beside them: how kernels round depends on the
# size of the batch, and a run that is resumed meets an image in other company than one that was not interrupted.
_TOGETHER = 16


class FrozenFeatures(NamedTuple):
    """What the two frozen encoders make of a batch: visual tokens (b, n, width), pooled features (b, f) or None."""

    visual_tokens: Tensor
    pooled: Optional[Tensor]


class FrozenFeatureCache:
    """Features by image key, kept on the CPU.

    A data set that gives a sample an ``image_key`` promises that equal keys mean equal pixels *after* the image
    processor; with random crops there must be no key. Memory is that of all visual tokens: 724 KB an image for
    EVA-CLIP-G in fp16, so this is for small sets.
    """

    def __init__(self):
        self._by_key: Dict[str, FrozenFeatures] = {}

    def __call__(
        self,
        keys: Sequence[str],
        image: Tensor,
        encode: Callable[[Tensor], FrozenFeatures],
    ) -> FrozenFeatures:
        """Features of ``image`` (b, 3, H, W), encoding only the images whose key is new."""
        new: Dict[str, int] = {k: i for i, k in enumerate(keys) if k not in self._by_key}
        todo = list(new.items())
        for start in range(0, len(todo), _TOGETHER):
            some = todo[start : start + _TOGETHER]
            rows = [row for _, row in some]
            encoded = encode(image[rows + rows[:1] * (_TOGETHER - len(rows))])
            for row, (key, _) in enumerate(some):
                self._by_key[key] = FrozenFeatures(
                    *(None if part is None else part[row].to("cpu", copy=True) for part in encoded)
                )
        return FrozenFeatures(*map(self._stack(image.device), zip(*(self._by_key[k] for k in keys))))

    def clear(self) -> None:
        """Forget everything: the encoders' weights have changed."""
        self._by_key.clear()

    @staticmethod
    def _stack(device) -> Callable[[List[Optional[Tensor]]], Optional[Tensor]]:
        return lambda parts: None if parts[0] is None else torch.stack(parts).to(device)
