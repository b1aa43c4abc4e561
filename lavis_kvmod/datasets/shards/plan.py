"""Who reads which part of an epoch, and in what order: plain arithmetic, without opening a shard.

Samples are numbered through: a *position* counts them over the shards in the order of the epoch, and on through the
next pass over the data, without end. An epoch is a range of positions. It is cut into one range a rank, which differ by
one sample at most, and a rank's range into one a worker, so that no sample is lost or comes twice, whatever the numbers
of shards, ranks and workers. Within its range a worker shuffles by a buffer.

All of it is a function of (shards, seed, epoch, ranks, workers), so that a run can go on from any batch.
"""

import random
from bisect import bisect_right
from itertools import accumulate
from typing import List, NamedTuple, Optional, Sequence, Union

import numpy as np
import webdataset

from lavis_kvmod.datasets.seeding import stable_hash

__all__ = ["Place", "Positions", "RankPlan", "WorkerShare", "shuffled_range"]


class Place(NamedTuple):
    """Where a position is: the pass over the data, the shard's number in the list of shards, the row in the shard."""

    turn: int
    shard: int
    row: int


class Positions:
    """Positions over shards whose lengths are known.

    Args:
        counts: rows of each shard.
        seed: for the order of the shards, another in each pass; None for the order given.
    """

    def __init__(self, counts: Sequence[int], seed: Optional[int] = None):
        self._counts = list(counts)
        self._seed = seed
        self._turn: Optional[int] = None
        self._order: List[int] = []
        self._ends: List[int] = []
        self.total = sum(self._counts)

    def place(self, position: int) -> Place:
        """Where a position is."""
        turn, position = divmod(position, self.total)
        if turn != self._turn:
            self._order = shard_order(len(self._counts), self._seed, turn)
            self._ends = list(accumulate(self._counts[shard] for shard in self._order))
            self._turn = turn
        i = bisect_right(self._ends, position)
        start = self._ends[i - 1] if i else 0
        return Place(turn, self._order[i], position - start)


def shard_order(num_shards: int, seed: Optional[int], turn: int) -> List[int]:
    """The numbers of the shards in the order of one pass over them."""
    order = list(range(num_shards))
    if seed is not None:
        random.Random(stable_hash(seed, "shards", turn)).shuffle(order)
    return order


class WorkerShare(NamedTuple):
    """What one worker reads in an epoch.

    Attributes:
        start: its first position, counted from the epoch's.
        batch_sizes: of its batches; the worker's i-th is the rank's ``worker + i * num_workers``-th.
        padding: whether one more batch follows, of a sample that counts nothing.
    """

    start: int
    batch_sizes: List[int]
    padding: bool

    @property
    def num_samples(self) -> int:
        """How many samples the worker reads."""
        return sum(self.batch_sizes)


class RankPlan(NamedTuple):
    """What one rank reads in an epoch.

    Attributes:
        num_samples: of all ranks together.
        batch_size: samples in a batch of one rank; its last may be smaller.
        rank, world_size, num_workers: as usual; without worker processes there is one worker.
        even: whether all ranks get as many batches (training), if need be by a batch that counts nothing.
    """

    num_samples: int
    batch_size: int
    rank: int
    world_size: int
    num_workers: int
    even: bool

    @property
    def start(self) -> int:
        """The rank's first position, counted from the epoch's."""
        return self.rank * self.num_samples // self.world_size

    @property
    def num_own(self) -> int:
        """How many samples this rank reads."""
        return (self.rank + 1) * self.num_samples // self.world_size - self.start

    @property
    def num_batches(self) -> int:
        """How many batches this rank reads."""
        largest = -(-self.num_samples // self.world_size)
        return -(-(largest if self.even else self.num_own) // self.batch_size)

    def share(self, worker: int) -> WorkerShare:
        """What a worker reads. The workers take turns in giving the rank's batches."""
        sizes = [self._size(number) for number in range(self.num_batches)]
        before = sum(sum(sizes[other :: self.num_workers]) for other in range(worker))
        mine = sizes[worker :: self.num_workers]
        return WorkerShare(self.start + before, [size for size in mine if size], padding=0 in mine)

    def _size(self, number: int) -> int:
        return max(0, min(self.batch_size, self.num_own - number * self.batch_size))

    def role(self, process: int, start_batch: int) -> int:
        """The worker that a worker process plays when the rank's batches are read from ``start_batch`` on: PyTorch asks
        process 0 first."""
        return (process + start_batch) % self.num_workers

    def batches_before(self, worker: int, start_batch: int) -> int:
        """How many of a worker's batches come before the rank's ``start_batch``-th."""
        return len(range(worker, start_batch, self.num_workers))


def shuffled_range(length: int, buffer: int, *seed_parts: Union[int, str]) -> np.ndarray:
    """0 … length - 1 as webdataset's shuffle buffer gives them: (length,), int64."""
    if buffer <= 1:
        return np.arange(length)
    rng = random.Random(stable_hash(*seed_parts))
    order = webdataset.shuffle(buffer, initial=buffer, rng=rng)(iter(range(length)))
    return np.fromiter(order, dtype=np.int64, count=length)
