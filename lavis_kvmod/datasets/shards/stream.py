"""Batches from shards: what one worker reads, from any batch of any epoch on.

What has been trained on already is skipped without decoding an image, and, where the shards have an index, without
opening the shards that hold nothing else.
"""

import itertools
import random
from collections import deque
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Deque, Dict, Generator, Iterable, Iterator, Optional, Sequence, Union

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from lavis_kvmod.datasets.bad_samples import BadDataError
from lavis_kvmod.datasets.loading.images import each_image_once
from lavis_kvmod.datasets.loading.loader import PADDING, Batch, or_failure
from lavis_kvmod.datasets.seeding import stable_hash
from lavis_kvmod.datasets.shards.files import Shard, damage_of
from lavis_kvmod.datasets.shards.plan import Positions, RankPlan, WorkerShare, shard_order, shuffled_range
from lavis_kvmod.datasets.shards.rows import Kind, Row, rows_by_sample

__all__ = ["BatchStream", "IndexedRows", "RowReader", "ShardSource", "UncountedRows"]


@dataclass(frozen=True)
class RowReader:
    """How the rows of one shard are read.

    Attributes:
        kind, per_image, needs_target: see `rows_by_sample`.
        skips: whether a shard that is cut short is read as far as it goes.
    """

    kind: Kind
    per_image: bool
    needs_target: bool
    skips: bool

    def rows(self, shard: Shard) -> Generator[Row, None, None]:
        """The rows of a shard; where its index says how many there are, as many, and those that are missing with a
        ``problem``.

        Raises:
            FileNotFoundError: if it is gone.
            BadDataError: if it is cut short and this is not to be skipped, or no longer the file that was indexed.
        """
        damage = damage_of(shard) if shard.path.exists() else None  # the reader tells what is missing
        if damage and not (self.skips and damage.is_cut_short):
            raise BadDataError(damage.text)
        samples = rows_by_sample(shard.path, self.kind, per_image=self.per_image, needs_target=self.needs_target)
        with closing(samples):
            yield from _as_many(self.num_rows(shard), (row for _, rows in samples for row in rows), shard.path)

    def num_rows(self, shard: Shard) -> Optional[int]:
        """How many rows a shard has; None if that is not known."""
        if shard.contents is None:
            return None
        return self.num_counted(shard)

    def num_counted(self, shard: Shard) -> int:
        """How many rows a shard has that has been counted."""
        return shard.counted.images if self.per_image else shard.counted.texts


def _as_many(expected: Optional[int], rows: Iterable[Row], path: Path) -> Iterator[Row]:
    number = 0
    for number, row in enumerate(rows, start=1):
        if expected is not None and number > expected:
            raise BadDataError(f"{path}: expected {expected} rows, got more; it has been changed since it was indexed")
        yield row
    for missing in range(number, expected or 0):
        source = f"{path}, row {missing + 1} of {expected}"
        yield Row({"instance_id": f"{path.name}#{missing}", "source": source}, problem="it is missing")


@dataclass(frozen=True)
class IndexedRows:
    """Rows by position, over shards whose lengths are known: only those that hold a row that is wanted are opened.

    Attributes:
        shards: all, each with its `Contents`.
        reader: see there.
        seed: for the order of the shards; None for the order given.
        epoch_size: rows in an epoch. Epochs follow each other without a gap, so that those shorter than the data go
            through all of it.
    """

    shards: Sequence[Shard]
    reader: RowReader
    seed: Optional[int]
    epoch_size: int

    def read(self, wanted: Iterable[int], *, epoch: int, share: WorkerShare, stream: int) -> Iterator[Row]:
        """The rows at these positions, counted from the worker's first; they must ascend. (Here they tell all, and the
        worker's number, ``stream``, tells nothing more.)"""
        positions = Positions([self.reader.num_counted(shard) for shard in self.shards], self.seed)
        start = epoch * self.epoch_size + share.start
        places = (positions.place(start + position) for position in wanted)
        for (_, shard), group in itertools.groupby(places, key=lambda place: place[:2]):
            with closing(self.reader.rows(self.shards[shard])) as rows:
                yield from _pick(rows, (place.row for place in group))


@dataclass(frozen=True)
class UncountedRows:
    """Rows by position, over shards of unknown lengths: all that come before are read too, and dropped undecoded.

    Each of ``num_streams`` streams has shards of its own or, where there are fewer shards than streams, every
    so-many-th row of a shard. It goes round its shards without end. As an epoch may be shorter than the data, each
    starts at a row drawn anew, so that no part of a shard is left out for ever.

    Attributes:
        shards, reader, seed: as above.
        num_streams: workers of all ranks.
    """

    shards: Sequence[Shard]
    reader: RowReader
    seed: int
    num_streams: int

    def read(self, wanted: Iterable[int], *, epoch: int, share: WorkerShare, stream: int) -> Iterator[Row]:
        """The rows at these positions, counted from the worker's first; they must ascend.

        Raises:
            BadDataError: if there are no rows at all.
        """
        return _pick(self._endless(epoch, stream), wanted)

    def _endless(self, epoch: int, stream: int) -> Iterator[Row]:
        order = shard_order(len(self.shards), self.seed, epoch)
        mine = order[stream % len(order) :: self.num_streams]
        # The streams that share a shard take turns with its rows.
        sharing = len(range(stream % len(order), self.num_streams, len(order)))
        turns = slice(stream // len(order), None, sharing) if sharing > 1 else slice(None)

        def rows(shard: int) -> Iterator[Row]:
            return itertools.islice(self.reader.rows(self.shards[shard]), turns.start, None, turns.step)

        length = sum(1 for _ in rows(mine[0]))
        if not length:  # fewer rows than streams
            turns = slice(None)
            length = sum(1 for _ in rows(mine[0]))
        rng = random.Random(stable_hash(self.seed, "start", epoch, stream))
        start = rng.randrange(length) if length else 0
        first, *others = mine
        parts = [itertools.islice(rows(first), start, None), *map(rows, others), itertools.islice(rows(first), start)]
        count = 0
        while True:
            for row in itertools.chain.from_iterable(parts):
                count += 1
                yield row
            if not count:
                raise BadDataError(f"no samples in {', '.join(str(self.shards[shard].path) for shard in mine)}")
            rng.shuffle(mine)
            parts = [rows(shard) for shard in mine]


def _pick(rows: Iterable[Row], wanted: Iterable[int]) -> Iterator[Row]:
    """The rows of these numbers, which must ascend; no further than the last."""
    numbered = enumerate(rows)
    for number in wanted:
        yield next(row for at, row in numbered if at == number)


@dataclass(frozen=True, eq=False)
class BatchStream(IterableDataset):
    """One rank's batches of an epoch; each worker gives its own.

    Attributes:
        dataset: makes samples of rows, and batches of samples: see `lavis_kvmod.datasets.shards.datasets`.
        rows: `IndexedRows` or `UncountedRows`.
        plan: who reads what.
        buffer: rows that are shuffled among each other; 1 for none.
        seed, epoch: for the order and the augmentation.
        start_batch: the first batch that is given.
        grouped: whether a batch has an image once for all its samples that show it.
    """

    dataset: Any
    rows: Any
    plan: RankPlan
    buffer: int
    seed: int
    epoch: int = 0
    start_batch: int = 0
    grouped: bool = False

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        batches = self._batches(self.plan.role(info.id if info else 0, self.start_batch))
        while True:
            batch = or_failure(lambda: next(batches, None))
            if batch is None:
                return
            yield batch

    def _batches(self, worker: int) -> Iterator[Batch]:
        share = self.plan.share(worker)
        stream = self.plan.rank * self.plan.num_workers + worker
        read = partial(self.rows.read, epoch=self.epoch, share=share, stream=stream)
        order = shuffled_range(share.num_samples, self.buffer, self.seed, "buffer", self.epoch, stream)
        skipped = self.plan.batches_before(worker, self.start_batch)
        coming = _Coming(_in_order(read, order[sum(share.batch_sizes[:skipped]) :]), partial(_in_order, read, order))
        for size in share.batch_sizes[skipped:]:
            yield self._batch(coming, size)
        if share.padding and skipped <= len(share.batch_sizes):
            coming = _Coming(iter(()), partial(_in_order, read, [0]))
            yield {**self._batch(coming, 1), PADDING: True}

    def _batch(self, coming: "_Coming", size: int) -> Batch:
        samples, seeds = [], []
        drawn: Dict[str, Any] = {"seed": self.seed, "epoch": self.epoch, "views": {} if self.grouped else None}
        for _ in range(size):
            row = coming.take()
            seeds.append(stable_hash(self.seed, self.epoch, "answer", str(row.annotation["instance_id"])))
            samples.append(self.dataset.sample_of(itertools.chain([row], coming), **drawn))
        batch = self.dataset.collater(samples)
        if self.grouped:
            batch = each_image_once(batch, samples)
        # Under which the model draws an answer for each question.
        return {**batch, "sample_seeds": seeds} if "n_answers" in batch and self.dataset.for_training else batch


@dataclass(frozen=True, eq=False)
class ShardSource:
    """A `lavis_kvmod.datasets.loading.loader.Source` of batches from shards.

    Attributes:
        stream: the batches of any one epoch.
    """

    stream: BatchStream

    @property
    def dataset(self) -> Any:
        """Whose batches they are."""
        return self.stream.dataset

    @property
    def num_batches(self) -> int:
        """In an epoch."""
        return self.stream.plan.num_batches

    @property
    def order(self) -> Dict[str, Any]:
        """Shards are dealt out to ranks and workers."""
        return {"readers": [self.stream.plan.world_size, self.stream.plan.num_workers], "grouped": self.stream.grouped}

    def since(self, epoch: int, start: int) -> BatchStream:
        """The batches of an epoch from that one on."""
        return replace(self.stream, epoch=epoch, start_batch=start)

    def first_sample(self) -> Batch:
        """A batch of one sample."""
        plan = RankPlan(1, 1, rank=0, world_size=1, num_workers=1, even=True)
        return next(replace(self.stream, plan=plan, start_batch=0)._batches(0))


class _Coming:
    """The rows to come: taken one by one, or looked at ahead. After the last come all of them, over and over.

    Args:
        rows: those to come.
        again: gives all of them anew.
    """

    def __init__(self, rows: Iterator[Row], again: Callable[[], Iterator[Row]]):
        self._rows = itertools.chain(rows, itertools.chain.from_iterable(again() for _ in itertools.repeat(None)))
        self._ahead: Deque[Row] = deque()

    def take(self) -> Row:
        """The next row, which is then gone."""
        return self._ahead.popleft() if self._ahead else next(self._rows)

    def __iter__(self) -> Iterator[Row]:
        """The rows after it, which stay."""
        for number in itertools.count():
            while len(self._ahead) <= number:
                self._ahead.append(next(self._rows))
            yield self._ahead[number]


def _in_order(read: Callable[[Iterable[int]], Iterator[Row]], order: Union[Sequence[int], np.ndarray]) -> Iterator[Row]:
    """The rows at these positions, in this order; read in the shards' order, and kept until their turn."""
    kept: Dict[int, Row] = {}
    ascending = sorted(order)
    coming = zip(ascending, read(ascending))
    for position in order:
        while position not in kept:
            at, row = next(coming)
            kept[at] = row
        yield kept.pop(position)
