"""Batches by worker processes, from any batch of any epoch on, in spite of workers that are killed."""

import logging
import signal
import threading
import time
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from typing import Any, Callable, Dict, Iterator, List, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from lavis_kvmod.datasets.bad_samples import BadDataError
from lavis_kvmod.datasets.seeding import stable_hash
from lavis_kvmod.system.quiet import WarningTally, gathered_warnings

__all__ = ["PADDING", "Batch", "Loader", "Source", "or_failure"]

Batch = Dict[str, Any]

# Key of a batch that stands in where a rank has no sample left: it is computed, so that all ranks take part in every
# exchange, and counts nothing.
PADDING = "is_padding"

# Key of a batch for what libraries warned of while it was read; the main process tells it, for all workers.
_WARNINGS = "library_warnings"
_TALLY = WarningTally()

# Seconds a worker outlives a SIGTERM: time for the main process to finish its step and save.
_WORKER_GRACE = 30

# How often an epoch goes on after a worker process was lost (killed by the system for memory, mostly).
_WORKERS_LOST = 3


class Source(Protocol):
    """What a `Loader` reads: one rank's batches of any epoch.

    Attributes:
        dataset: whose batches they are.
        num_batches: in an epoch.
        order: what decides the order of the samples beside seed, epoch and their number; None or False where it does
            not. ``readers`` are ranks and workers, ``grouped`` is whether samples of an image stand together.
    """

    @property
    def dataset(self) -> Any: ...

    @property
    def num_batches(self) -> int: ...

    @property
    def order(self) -> Dict[str, Any]: ...

    def since(self, epoch: int, start: int) -> Dataset:
        """The batches of an epoch from that one on: by number from 0, or, as an iterable data set, each worker's own.
        An error of the data comes in place of a batch: see `or_failure`."""
        ...

    def first_sample(self) -> Batch:
        """A batch of one sample, also on a rank that has none of its own."""


class Loader:
    """One rank's batches of the epoch that was set last, from the batch that was set on.

    Iterating starts worker processes anew, which end with the epoch. If one is killed, reading goes on with new ones at
    the batch that is due, up to 3 times an epoch: what a batch holds does not depend on who reads it.

    Attributes:
        dataset: whose batches they are.
        order: see `Source`.

    Args:
        source: what is read.
        num_workers, pin_memory: as `torch.utils.data.DataLoader`.
    """

    def __init__(self, source: Source, *, num_workers: int = 0, pin_memory: bool = False):
        self.dataset = source.dataset
        self.order = source.order
        self._source = source
        self._num_workers, self._pin_memory = num_workers, pin_memory
        self._epoch, self._start = 0, 0

    def __len__(self) -> int:
        """Batches in a whole epoch; in training the same on all ranks."""
        return self._source.num_batches

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Which epoch is read next, and how many of its batches have been had already.

        Raises:
            ValueError: for more batches than there are.
        """
        if not 0 <= start_batch <= len(self):
            raise ValueError(f"start_batch: expected at most the {len(self)} batches of an epoch, got {start_batch}")
        self._epoch, self._start = epoch, start_batch

    def __iter__(self) -> Iterator[Batch]:
        """Start reading.

        Raises (while iterating):
            BadDataError, FileNotFoundError: as a worker process raised them, without its traceback.
        """
        epoch = self._epoch
        for batch in _outliving_workers(lambda start: self._read(epoch, start), self._start):
            if isinstance(batch, _Failure):
                raise batch.error
            _TALLY.tell(batch.pop(_WARNINGS, ()))
            yield batch

    def first_sample(self) -> Batch:
        """A batch of one sample, also on a rank that has none of its own."""
        return self._source.first_sample()

    def _read(self, epoch: int, start: int) -> Iterator[Any]:
        loader: DataLoader = DataLoader(
            self._source.since(epoch, start),
            batch_size=None,  # its items are batches already
            num_workers=self._num_workers,
            pin_memory=self._pin_memory,
            collate_fn=_as_it_is,
            worker_init_fn=_stay_calm,
            # A DataLoader draws a seed for its workers: not from the run's own randomness.
            generator=torch.Generator().manual_seed(stable_hash("workers", epoch)),
        )
        return iter(loader)


# ---------------------------------------------------------------- what is wrong with the data


class _Failure:
    """In place of a batch: why there is none. PyTorch would wrap the error in the traceback of the worker process."""

    def __init__(self, error: Exception):
        self.error = error


def or_failure(make: Callable[[], Any]) -> Any:
    """What ``make`` gives; or, where the data are at fault and not the program, what has a `Loader` raise the error.
    What libraries warn of meanwhile travels with a batch."""
    try:
        with gathered_warnings() as gathered:
            made = make()
    except (BadDataError, FileNotFoundError) as error:
        return _Failure(error)
    return {**made, _WARNINGS: gathered} if gathered and isinstance(made, dict) else made


# ---------------------------------------------------------------- workers that are killed


def _as_it_is(batch: Any) -> Any:
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
    _try_get_data), that of a connection to it (torch/multiprocessing/reductions.py, rebuild_storage_fd), or, where
    batches are pinned, that of the thread which met the broken connection (dataloader.py, _get_data)."""
    text = str(error)
    if "DataLoader worker (pid" in text:
        return True
    if text.startswith("Caught "):  # an error in a data set
        return False
    if isinstance(error, RuntimeError) and not text.startswith("Pin memory thread exited"):
        return False
    end = time.monotonic() + 1  # its connections are closed a moment before it counts as dead
    while all(worker.exitcode is None for worker in workers) and workers and time.monotonic() < end:
        time.sleep(0.02)
    return any(worker.exitcode is not None for worker in workers)


def _stay_calm(worker_id: int) -> None:
    """In a worker: Ctrl-C and SIGTERM reach the whole process group, and the main process still wants its batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # not on Windows
        signal.signal(signal.SIGTERM, lambda signum, frame: signal.alarm(_WORKER_GRACE))
