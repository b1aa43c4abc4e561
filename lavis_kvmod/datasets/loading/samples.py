"""The batches of a data set that has samples by number."""

from dataclasses import dataclass
from typing import Any, Callable, Dict, Optional

import torch
from torch.utils.data import Dataset

from lavis_kvmod.datasets.loading.images import Views, each_image_once
from lavis_kvmod.datasets.loading.loader import PADDING, Batch, or_failure
from lavis_kvmod.datasets.loading.plans import BatchPlan, EpochPlan, SamplePlan
from lavis_kvmod.datasets.seeding import seed_from, stable_hash
from lavis_kvmod.system.randomness import own_randomness

__all__ = ["SampleSource"]


@dataclass(frozen=True)
class SampleSource:
    """A `Source` of samples by number, each read under a seed of its own.

    Where the plan groups samples by image, a batch has each image once, in one augmented view, which depends on seed,
    epoch and image: ``image`` (i, 3, H, W) and ``image_key`` are the images' (so is ``image_mask``, where samples have
    several), ``image_index`` (b,) tells each sample's.

    Attributes:
        dataset: with a length; for a plan that groups, see `lavis_kvmod.datasets.loading.images`.
        plan: which samples a batch holds.
        seed: for augmentation.
        collate: makes a batch of samples; by default the data set's ``collater``, or torch's.
    """

    dataset: Any
    plan: SamplePlan
    seed: int = 0
    collate: Optional[Callable] = None

    @property
    def num_batches(self) -> int:
        """In an epoch."""
        return self.plan.num_batches

    @property
    def order(self) -> Dict[str, Any]:
        """Ranks and workers do not change it."""
        return {"readers": None, "grouped": self.plan.images is not None}

    def since(self, epoch: int, start: int) -> Dataset:
        """The batches of an epoch from that one on."""
        return _Batches(self, self.plan.epoch(epoch), start)

    def first_sample(self) -> Batch:
        """A batch of the first sample."""
        return self.read(BatchPlan(0, 0, [0]))

    def read(self, batch: BatchPlan) -> Batch:
        """What a batch holds."""
        samples, views = [], Views()
        collate = self.collate or getattr(self.dataset, "collater", None) or torch.utils.data.default_collate
        with own_randomness():
            for index in batch.samples:
                seed_from(self.seed, batch.epoch, self.plan.view(index))
                samples.append(self.dataset[index] if self.plan.images is None else views.sample(self.dataset, index))
            seed_from(self.seed, batch.epoch, "batch", batch.number)
            read = collate(samples)
        if self.plan.images is not None:
            read = each_image_once(read, samples)
        if "n_answers" in read:  # the model draws an answer for each question under its own seed
            read["sample_seeds"] = [stable_hash(self.seed, batch.epoch, "answer", index) for index in batch.samples]
        return {**read, PADDING: True} if batch.is_padding else read


class _Batches(Dataset):
    def __init__(self, source: SampleSource, epoch: EpochPlan, start: int):
        self._source, self._epoch, self._start = source, epoch, start

    def __len__(self) -> int:
        return self._source.num_batches - self._start

    def __getitem__(self, number: int) -> Batch:
        if number >= len(self):
            raise IndexError(number)
        return or_failure(lambda: self._source.read(self._epoch.batch(self._start + number)))
