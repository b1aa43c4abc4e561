"""Batches from shards: what one worker reads, and a loader that can start at any batch of any epoch.

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
from typing import Any, Callable, Deque, Dict, Iterable, Iterator, Optional, Sequence

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lavis_kvmod.datasets.bad_samples import BadDataError
from lavis_kvmod.datasets.seeding import stable_hash
from lavis_kvmod.datasets.shards.files import Shard, damage_of
from lavis_kvmod.datasets.shards.plan import Positions, RankPlan, WorkerShare, shard_order, shuffled_range
from lavis_kvmod.datasets.shards.rows import Kind, Row, rows_by_sample

__all__ = ["PADDING", "BatchStream", "IndexedRows", "RowReader", "ShardLoader", "UncountedRows"]

# Key of a batch that is there only so that all ranks have as many: it is computed, and counts nothing.
PADDING = "is_padding"


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

    def rows(self, shard: Shard) -> Iterator[Row]:
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
        return shard.contents.images if self.per_image else shard.contents.texts


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
        positions = Positions([self.reader.num_rows(shard) for shard in self.shards], self.seed)
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
    """

    dataset: Any
    rows: Any
    plan: RankPlan
    buffer: int
    seed: int
    epoch: int = 0
    start_batch: int = 0

    def __iter__(self) -> Iterator[Dict[str, Any]]:
        info = get_worker_info()
        worker = self.plan.role(info.id if info else 0, self.start_batch)
        share = self.plan.share(worker)
        stream = self.plan.rank * self.plan.num_workers + worker
        read = partial(self.rows.read, epoch=self.epoch, share=share, stream=stream)
        order = shuffled_range(share.num_samples, self.buffer, self.seed, "buffer", self.epoch, stream)
        skipped = self.plan.batches_before(worker, self.start_batch)
        coming = _Coming(_in_order(read, order[sum(share.batch_sizes[:skipped]) :]), partial(_in_order, read, order))
        try:
            for size in share.batch_sizes[skipped:]:
                yield self._batch(coming, size)
            if share.padding and skipped <= len(share.batch_sizes):
                coming = _Coming(iter(()), partial(_in_order, read, [0]))
                yield {**self._batch(coming, 1), PADDING: True}
        except (BadDataError, FileNotFoundError) as error:  # what is wrong with the data, not with the program
            yield _Failure(error)

    def _batch(self, coming: "_Coming", size: int) -> Dict[str, Any]:
        samples = []
        for _ in range(size):
            row = coming.take()
            samples.append(self.dataset.sample_of(itertools.chain([row], coming), seed=self.seed, epoch=self.epoch))
        return self.dataset.collater(samples)


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


def _in_order(read: Callable[[Iterable[int]], Iterator[Row]], order: Sequence[int]) -> Iterator[Row]:
    """The rows at these positions, in this order; read in the shards' order, and kept until their turn."""
    kept: Dict[int, Row] = {}
    ascending = sorted(order)
    coming = zip(ascending, read(ascending))
    for position in order:
        while position not in kept:
            at, row = next(coming)
            kept[at] = row
        yield kept.pop(position)


class ShardLoader:
    """This rank's batches of the epoch that was set last, from the batch that was set on.

    Iterating starts worker processes anew, which end with the epoch.

    Attributes:
        dataset: whose batches they are.
    """

    def __init__(
        self,
        stream: BatchStream,
        *,
        num_workers: int,
        pin_memory: bool,
        worker_init_fn: Optional[Callable[[int], None]] = None,
    ):
        self.dataset = stream.dataset
        self._stream = stream
        self._options = {"num_workers": num_workers, "pin_memory": pin_memory, "worker_init_fn": worker_init_fn}

    def __len__(self) -> int:
        """Batches in a whole epoch, the same on all ranks in training."""
        return self._stream.plan.num_batches

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Which epoch is read next, and how many of its batches have been had already.

        Raises:
            ValueError: for more batches than there are.
        """
        if not 0 <= start_batch <= len(self):
            raise ValueError(f"start_batch: expected at most the {len(self)} batches of an epoch, got {start_batch}")
        self._stream = replace(self._stream, epoch=epoch, start_batch=start_batch)

    def __iter__(self) -> Iterator[Dict[str, Any]]:
        """Start reading.

        Raises (while iterating):
            BadDataError, FileNotFoundError: as the worker process raised them.
        """
        # A DataLoader draws a seed for its workers: not from the run's own randomness.
        generator = torch.Generator().manual_seed(stable_hash(self._stream.seed, "workers", self._stream.epoch))
        loader = DataLoader(self._stream, batch_size=None, collate_fn=_as_it_is, generator=generator, **self._options)
        return _Batches(iter(loader))

    def first_sample(self) -> Dict[str, Any]:
        """A batch of one sample, on a rank that may have none of its own."""
        plan = RankPlan(1, 1, rank=0, world_size=1, num_workers=1, even=True)
        return next(iter(_Batches(iter(replace(self._stream, plan=plan, start_batch=0)))))


class _Failure:
    """In place of a batch: why there is none. PyTorch would wrap the error in the traceback of the worker process."""

    def __init__(self, error: Exception):
        self.error = error


class _Batches:
    """Batches until one is a `_Failure`."""

    def __init__(self, batches: Iterator):
        self._batches = batches

    def __iter__(self) -> "_Batches":
        return self

    def __next__(self) -> Dict[str, Any]:
        batch = next(self._batches)
        if isinstance(batch, _Failure):
            raise batch.error
        return batch


def _as_it_is(batch):
    return batch
