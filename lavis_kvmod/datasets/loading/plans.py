"""Which samples a batch holds: plain arithmetic, a function of (seed, epoch, number of the batch).

So a run can go on from any batch, with any number of workers, on any number of ranks.
"""

from typing import List, NamedTuple, Optional

import numpy as np
import torch

__all__ = ["BatchPlan", "EpochPlan", "SamplePlan"]


class BatchPlan(NamedTuple):
    """What a worker is asked for: the epoch, the batch's number in it, its samples, whether it is padding."""

    epoch: int
    number: int
    samples: List[int]
    is_padding: bool = False


class SamplePlan(NamedTuple):
    """One rank's batches of any epoch; every sample comes once an epoch, on one rank.

    The ranks deal out the order of the samples among them, so that batch i of all ranks together is batch i of one
    process with ``world_size`` times the batch size. Where the last batch does not go round, some ranks' are smaller. A
    rank that has none gets one sample again in training, marked as padding; in evaluation it has a batch less.

    With ``images``, the samples of an image stand together: images come in an order of their own, each as likely at any
    place, and the samples of each in an order of theirs. Batches are as large and as many as without; an image that
    stands across the border of two batches, or of two ranks, is in both.

    Attributes:
        num_samples: size of the data set.
        batch_size: samples in a batch of this rank.
        rank, world_size: as usual.
        seed: for training: seed and epoch decide the order, as `torch.utils.data.DistributedSampler`'s. None, for
            evaluation, keeps the data set's.
        images: for each sample the first one that shows the same image, (num_samples,) int64; None for no grouping.
    """

    num_samples: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    seed: Optional[int] = None
    images: Optional[np.ndarray] = None

    @property
    def num_batches(self) -> int:
        """Batches in an epoch; in training the same on all ranks."""
        largest = len(range(0 if self.seed is not None else self.rank, self.num_samples, self.world_size))
        return -(-largest // self.batch_size)

    def epoch(self, epoch: int) -> "EpochPlan":
        """The batches of an epoch."""
        order = places = np.arange(self.num_samples)
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(self.num_samples, generator=generator).numpy()
            places = torch.randperm(self.num_samples, generator=generator).numpy()
        if self.images is not None:
            order = order[np.argsort(places[self.images[order]], kind="stable")]
        return EpochPlan(self, epoch, order)

    def view(self, sample: int) -> int:
        """What the augmentation of a sample's image is drawn under, with seed and epoch."""
        return sample if self.images is None else int(self.images[sample])


class EpochPlan(NamedTuple):
    """One rank's batches of one epoch.

    Attributes:
        plan, epoch: which.
        order: the samples in the order in which they are dealt out, (num_samples,) int64.
    """

    plan: SamplePlan
    epoch: int
    order: np.ndarray

    def batch(self, number: int) -> BatchPlan:
        """The batch of that number."""
        size = self.plan.batch_size * self.plan.world_size
        together = self.order[number * size : (number + 1) * size]
        if self.plan.images is None:
            mine = together[self.plan.rank :: self.plan.world_size]
        else:  # neighbours show the same image
            mine = np.array_split(together, self.plan.world_size)[self.plan.rank]
        return BatchPlan(self.epoch, number, (mine if len(mine) else together[:1]).tolist(), is_padding=not len(mine))
