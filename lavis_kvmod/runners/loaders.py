"""What a batch holds is a function of (seed, epoch, number of the batch): the order of the samples, and their
augmentation. So a run can go on from any batch, with any number of workers, on any number of ranks.
"""

import logging
import signal
import threading
import time
from functools import partial
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional

import torch
from torch.utils.data import ChainDataset, ConcatDataset, DataLoader, Dataset, Sampler

from lavis_kvmod.datasets.seeding import seeded, stable_hash

__all__ = ["PADDING", "EpochBatches", "EpochLoader", "EvalLoader", "StreamLoader", "stay_calm", "stream_of"]

# Key of a batch that stands in where a rank has no sample left: it is computed, so that all ranks take part in every
# exchange, and counts nothing.
PADDING = "is_padding"

# Seconds a worker outlives a SIGTERM: time for the main process to finish its step and save.
_WORKER_GRACE = 30

# How often an epoch goes on after a worker process was lost (killed by the system for memory, mostly).
_WORKERS_LOST = 3


class BatchPlan(NamedTuple):
    """What the loader asks a worker for: the epoch, the batch's number in it, its samples, whether it is padding."""

    epoch: int
    number: int
    indices: List[int]
    is_padding: bool


class EpochBatches(Sampler[BatchPlan]):
    """One rank's batches of an epoch.

    The order of the samples depends on seed and epoch, as `torch.utils.data.DistributedSampler`'s; the ranks deal it
    out among them, so that batch i of all ranks together is batch i of one process with ``world_size`` times the batch
    size. Every sample comes once: where the last batch does not go round, some ranks' are smaller, and a rank that has
    none gets one sample again, marked as padding.

    Args:
        num_samples: size of the data set.
        batch_size: samples in a batch of this rank.
        seed, rank, world_size: as usual.
    """

    def __init__(self, num_samples: int, batch_size: int, *, seed: int, rank: int = 0, world_size: int = 1):
        self._num_samples = num_samples
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._global_batch = batch_size * world_size
        self._epoch, self._start = 0, 0

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Which epoch is read next, and from which of its batches on."""
        self._epoch, self._start = epoch, start_batch

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return -(-self._num_samples // self._global_batch)

    def __iter__(self) -> Iterator[BatchPlan]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        order = torch.randperm(self._num_samples, generator=generator).tolist()
        for number in range(self._start, len(self)):
            together = order[number * self._global_batch : (number + 1) * self._global_batch]
            mine = together[self._rank :: self._world_size]
            yield BatchPlan(self._epoch, number, mine or together[:1], is_padding=not mine)


class _Batches(Dataset):
    """A data set of whole batches, each sample read under a seed of its own."""

    def __init__(self, dataset: Dataset, collate: Optional[Callable], seed: int):
        self._dataset = dataset
        self._collate = collate or torch.utils.data.default_collate
        self._seed = seed

    def __getitem__(self, plan: BatchPlan) -> Dict[str, Any]:
        samples = []
        for index in plan.indices:
            with seeded(self._seed, plan.epoch, index):
                samples.append(self._dataset[index])
        with seeded(self._seed, plan.epoch, "batch", plan.number):
            batch = self._collate(samples)
        if plan.is_padding:
            batch[PADDING] = True
        return batch


class EpochLoader:
    """Training batches of a map-style data set, from any batch of any epoch on.

    Iterating gives this rank's batches of the epoch set last. If a worker process is killed, reading goes on with new
    ones, up to 3 times an epoch: what a batch holds does not depend on who reads it.

    Args:
        dataset: with a length.
        batch_size: samples in a batch of this rank.
        collate: makes a batch of samples; torch's default if None.
        num_workers, pin_memory: as `torch.utils.data.DataLoader`.
        seed, rank, world_size: see `EpochBatches`.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        collate: Optional[Callable] = None,
        num_workers: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ):
        self.dataset = dataset
        self._batches = EpochBatches(len(dataset), batch_size, seed=seed, rank=rank, world_size=world_size)
        self._loader = DataLoader(
            _Batches(dataset, collate, seed),
            batch_size=None,  # the sampler's items are batches already
            sampler=self._batches,
            num_workers=num_workers,
            pin_memory=pin_memory,
            collate_fn=_as_it_is,
            worker_init_fn=stay_calm,
            generator=_own_generator(seed, rank),
        )
        self._epoch, self._start = 0, 0

    def __len__(self) -> int:
        """Batches in a whole epoch, the same on all ranks."""
        return len(self._batches)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Which epoch is read next, and from which of its batches on."""
        self._epoch, self._start = epoch, start_batch

    def __iter__(self) -> Iterator[Dict[str, Any]]:
        def read(start: int) -> Iterator[Dict[str, Any]]:
            self._batches.set_epoch(self._epoch, start)
            return iter(self._loader)

        return _outliving_workers(read, self._start)


class EvalLoader:
    """Evaluation batches in order, each sample on one rank (DistributedSampler would repeat some to give all ranks as
    many). Killed workers are replaced as in `EpochLoader`.

    Args:
        dataset, batch_size, collate, num_workers, seed, rank, world_size, pin_memory: see `EpochLoader`.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        collate: Optional[Callable] = None,
        num_workers: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ):
        self.dataset = dataset
        self.collate_fn = collate or torch.utils.data.default_collate
        self._mine = range(rank, len(dataset), world_size)
        self._batch_size = batch_size
        self._make = partial(
            DataLoader,
            dataset,
            batch_size=batch_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
            collate_fn=self.collate_fn,
            worker_init_fn=stay_calm,
            generator=_own_generator(seed, rank),
        )

    def __len__(self) -> int:
        """Batches of this rank."""
        return -(-len(self._mine) // self._batch_size)

    def __iter__(self) -> Iterator[Dict[str, Any]]:
        return _outliving_workers(lambda start: iter(self._make(sampler=self._mine[start * self._batch_size :])))


class StreamLoader:
    """A data set's own loader, whose killed workers are replaced as in `EpochLoader`.

    Args:
        loader: with a length, ``dataset`` and ``set_epoch(epoch, start_batch)``.
    """

    def __init__(self, loader):
        self.dataset = loader.dataset
        self._loader = loader
        self._epoch, self._start = 0, 0

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return len(self._loader)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Which epoch is read next, and from which of its batches on."""
        self._loader.set_epoch(epoch, start_batch)
        self._epoch, self._start = epoch, start_batch

    def __iter__(self) -> Iterator[Dict[str, Any]]:
        def read(start: int) -> Iterator[Dict[str, Any]]:
            self._loader.set_epoch(self._epoch, start)
            return iter(self._loader)

        return _outliving_workers(read, self._start)


def stream_of(dataset) -> Optional[Any]:
    """The data set that makes its own loader (``make_loader``), alone or as the only one of a concatenation."""
    while isinstance(dataset, (ConcatDataset, ChainDataset)) and len(dataset.datasets) == 1:
        dataset = dataset.datasets[0]
    return dataset if hasattr(dataset, "make_loader") else None


def _own_generator(seed: int, rank: int) -> torch.Generator:
    """A DataLoader draws a seed for its workers whenever it is iterated over; not from the run's own randomness."""
    return torch.Generator().manual_seed(stable_hash("workers", seed, rank))


def _as_it_is(batch):
    return batch


def _outliving_workers(read: Callable[[int], Iterator], start: int = 0) -> Iterator:
    """All batches from ``start`` on. Where a worker process is killed, reading goes on with new ones at the batch that
    is due.

    Args:
        read: gives an iterator over a DataLoader, from a batch on.
        start: the first batch.
    """
    number, lost = start, 0
    while True:
        workers: List[BaseProcess] = []
        try:
            known = set(active_children())
            batches = _quietly(read, number)
            workers = [child for child in active_children() if child not in known]
            for batch in batches:
                yield batch
                number += 1
            return
        except (RuntimeError, OSError, EOFError) as error:
            if lost == _WORKERS_LOST or not _is_lost_worker(error, workers):
                raise
            lost += 1
            told = f"{type(error).__name__}: {error}".split("\n")[0]
            logging.warning("a data worker was lost (%s); reading goes on at batch %d", told, number)


def _quietly(read: Callable[[int], Iterator], start: int) -> Iterator:
    """``read(start)``, told of a worker's death where it reads, not by an error raised amid whatever is running.

    PyTorch raises from a SIGCHLD handler, which may be halfway through an optimiser step; without the handler it finds
    out within 5 s when it waits for a batch (torch/utils/data/_utils/signal_handling.py, dataloader.py).
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        return read(start)
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        return read(start)
    finally:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


def _is_lost_worker(error: Exception, workers: List[BaseProcess]) -> bool:
    """Whether an error of reading comes from a worker's death: PyTorch's, which has no class of its own (dataloader.py,
    _try_get_data), or that of a connection to it (torch/multiprocessing/reductions.py, rebuild_storage_fd)."""
    text = str(error)
    if "DataLoader worker (pid" in text:
        return True
    if text.startswith("Caught ") or isinstance(error, RuntimeError):  # an error in a data set
        return False
    end = time.monotonic() + 1  # its connections are closed a moment before it counts as dead
    while all(worker.exitcode is None for worker in workers) and workers and time.monotonic() < end:
        time.sleep(0.02)
    return any(worker.exitcode is not None for worker in workers)


def stay_calm(worker_id: int) -> None:
    """In a worker: Ctrl-C and SIGTERM reach the whole process group, and the main process still wants its batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # not on Windows
        signal.signal(signal.SIGTERM, lambda signum, frame: signal.alarm(_WORKER_GRACE))
