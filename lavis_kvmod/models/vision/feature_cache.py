"""Remember what the frozen encoders said of an image, so that later epochs skip them."""

import logging
from typing import Any, Callable, Dict, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

__all__ = ["DEFAULT_GIB", "TOGETHER", "FrozenFeatureCache", "FrozenFeatures"]

# Images are encoded so many at a time, the last ones with copies of one beside them: how kernels round depends on the
# size of the batch, and a run that is resumed meets an image in other company than one that was not interrupted.
TOGETHER = 16

# What a process may keep unless it is told: 5,900 images of EVA-CLIP-G at 224 px.
DEFAULT_GIB = 4.0


class FrozenFeatures(NamedTuple):
    """What the two frozen encoders make of a batch: visual tokens (b, n, width), and pooled features (b, f), those of a
    grid (b, p, f), or None."""

    visual_tokens: Tensor
    pooled: Optional[Tensor]


class FrozenFeatureCache:
    """Features by image key, kept in the CPU's memory.

    A data set that gives a sample an ``image_key`` promises that equal keys mean equal pixels *after* the image
    processor; with random crops there must be no key. Memory is that of all visual tokens: 724 KB an image for
    EVA-CLIP-G in fp16. What is met when the cache is full is encoded in the same way: a run that is
    resumed fills it with others, and computes the same.

    Args:
        max_gib: how much is kept, in each process; when that is reached, further images are encoded anew each time. 0
            keeps nothing, for a cache that only reads files.
        files: where to look first (`lavis_kvmod.models.vision.feature_files.FeatureFiles`); may be set later.
    """

    def __init__(self, max_gib: float = DEFAULT_GIB, files: Any = None):
        self._by_key: Dict[str, FrozenFeatures] = {}
        self._max_gib = max_gib
        self.files = files
        self._told_missing = False
        self._bytes_left, self._is_full = max_gib * 2**30, max_gib == 0

    def __call__(
        self,
        keys: Sequence[str],
        image: Tensor,
        encode: Callable[[Tensor], FrozenFeatures],
    ) -> FrozenFeatures:
        """Features of ``image`` (b, 3, H, W), encoding only the images whose key is new."""
        not_kept = self._from_files(keys)
        new: Dict[str, int] = {k: i for i, k in enumerate(keys) if k not in self._by_key and k not in not_kept}
        todo = list(new.items())
        for start in range(0, len(todo), TOGETHER):
            some = todo[start : start + TOGETHER]
            rows = [row for _, row in some]
            encoded = encode(image[rows + rows[:1] * (TOGETHER - len(rows))])
            pooled = encoded.pooled
            for row, (key, _) in enumerate(some):
                own = FrozenFeatures(
                    _kept(encoded.visual_tokens[row]), _kept(pooled[row]) if pooled is not None else None
                )
                (self._by_key if self._has_room_for(own) else not_kept)[key] = own
        found = [self._by_key.get(key) or not_kept[key] for key in keys]
        visual_tokens = torch.stack([one.visual_tokens for one in found]).to(image.device)
        all_pooled = [one.pooled for one in found if one.pooled is not None]
        return FrozenFeatures(visual_tokens, torch.stack(all_pooled).to(image.device) if all_pooled else None)

    def _from_files(self, keys: Sequence[str]) -> Dict[str, FrozenFeatures]:
        if self.files is None:
            return {}
        found = {key: self.files.get(key) for key in set(keys)}
        missing = [key for key, features in found.items() if features is None]
        if missing and not self._told_missing:
            self._told_missing = True
            logging.warning(
                "%s has no features of some images, such as %s: they are encoded; lavis-kvmod cache-features --splits "
                "writes those of other splits",
                *(self.files.folder, missing[0]),
            )
        return {key: features for key, features in found.items() if features is not None}

    def _has_room_for(self, features: FrozenFeatures) -> bool:
        needed = sum(part.numel() * part.element_size() for part in features if part is not None)
        if not self._is_full and needed > self._bytes_left:
            self._is_full = True
            logging.warning(
                "the features of %d images fill model.feature_cache_gib: %g; further images are encoded each time",
                *(len(self._by_key), self._max_gib),
            )
        if not self._is_full:
            self._bytes_left -= needed
        return not self._is_full

    def __len__(self) -> int:
        return len(self._by_key)

    def entries(self) -> Dict[str, FrozenFeatures]:
        """What is remembered, by key."""
        return dict(self._by_key)

    def remember(self, entries: Dict[str, FrozenFeatures]) -> None:
        """Take over what was encoded elsewhere, as far as there is room; the tensors are shared."""
        for key, own in entries.items():
            if key not in self._by_key and self._has_room_for(own):
                self._by_key[key] = own

    def clear(self) -> None:
        """Forget everything: the encoders' weights have changed."""
        self._by_key.clear()
        self._bytes_left, self._is_full = self._max_gib * 2**30, self._max_gib == 0


def _kept(part: Tensor) -> Tensor:
    return part.to("cpu", copy=True)
