import multiprocessing
import os
import random
import signal
import time
import types
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import DistributedSampler

from lavis_kvmod.datasets.bad_samples import BadDataError
from lavis_kvmod.datasets.loading import loader
from lavis_kvmod.datasets.loading.loader import PADDING, Loader
from lavis_kvmod.datasets.loading.plans import SamplePlan
from lavis_kvmod.datasets.loading.samples import SampleSource
from lavis_kvmod.runners.loaders import stream_of
from lavis_kvmod.system.quiet import WarningTally


class Noise(torch.utils.data.Dataset):
    """Each sample draws from all three generators, as augmentations do."""

    def __init__(self, size=11, killed_once=None):
        self.size, self.killed_once = size, killed_once

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if self.killed_once is not None and index == 5 and not self.killed_once.exists():
            self.killed_once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"index": index, "drawn": torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()])}


def read(epoch=0, start_batch=0, dataset=None, num_workers=0, **ranks):
    dataset = dataset or Noise()
    source = SampleSource(dataset, SamplePlan(len(dataset), 2, seed=3, **ranks), seed=3)
    reading = Loader(source, num_workers=num_workers)
    reading.set_epoch(epoch, start_batch)
    return list(reading)


def drawn(batches):
    return torch.cat([batch["drawn"] for batch in batches])


def test_what_is_read_depends_on_seed_epoch_and_sample_alone():
    whole = read(epoch=2)
    assert torch.equal(drawn(read(epoch=2, num_workers=2)), drawn(whole))
    assert torch.equal(drawn(read(epoch=2, start_batch=3)), drawn(whole[3:]))
    assert not torch.equal(drawn(read(epoch=1)).sort(0).values, drawn(whole).sort(0).values)
    by_index = {int(i): row.tolist() for b in whole for i, row in zip(b["index"], b["drawn"])}
    for rank in range(2):
        for batch in read(epoch=2, rank=rank, world_size=2):
            for i, row in zip(batch["index"], batch["drawn"]):
                assert by_index[int(i)] == row.tolist()


def test_reading_leaves_the_runs_randomness_alone():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    read()
    read(num_workers=1)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])


@pytest.mark.parametrize("size", [1, 4, 7, 8, 9, 13])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_together_read_what_one_process_reads(size, world_size):
    def plans(batch_size, rank, world_size):
        plan = SamplePlan(size, batch_size, seed=1, rank=rank, world_size=world_size)
        return [plan.epoch(5).batch(number) for number in range(plan.num_batches)]

    alone = [sorted(plan.samples) for plan in plans(2 * world_size, 0, 1)]
    of_ranks = [plans(2, rank, world_size) for rank in range(world_size)]
    together = [sorted(i for p in step if not p.is_padding for i in p.samples) for step in zip(*of_ranks)]
    assert together == alone
    assert len({len(plans) for plans in of_ranks}) == 1 and all(p.samples for plans in of_ranks for p in plans)
    assert sorted(sum(together, [])) == list(range(size))


def test_the_order_is_torchs_own():
    sampler = DistributedSampler(range(12), 2, 1, shuffle=True, seed=9)
    sampler.set_epoch(4)
    plan = SamplePlan(12, 2, seed=9, rank=1, world_size=2)
    assert [i for number in range(3) for i in plan.epoch(4).batch(number).samples] == list(sampler)


def test_a_rank_without_samples_left_gets_padding():
    last = [read(dataset=Noise(5), rank=rank, world_size=2)[-1] for rank in range(2)]
    assert [PADDING in batch for batch in last] == [False, True]
    assert last[0]["index"].tolist() == last[1]["index"].tolist()


@pytest.mark.slow  # PyTorch looks every 5 seconds
def test_a_worker_that_is_killed_costs_nothing(tmp_path, caplog):
    whole = drawn(read())
    survived = drawn(read(dataset=Noise(killed_once=tmp_path / "killed"), num_workers=2))
    assert (tmp_path / "killed").exists() and torch.equal(survived, whole)
    assert "a data worker was lost" in caplog.text


PIN_THREAD = RuntimeError("Pin memory thread exited unexpectedly")  # PyTorch's words (dataloader.py, _get_data)


@pytest.mark.parametrize(
    "error, dead, lost",
    [
        (RuntimeError("DataLoader worker (pid(s) 17, 18) exited unexpectedly"), False, True),
        (RuntimeError("DataLoader worker (pid 17) is killed by signal: Killed. "), False, True),
        (PIN_THREAD, True, True),  # the thread that pins met the broken connection
        (PIN_THREAD, False, False),  # it ended for a reason of its own
        (ConnectionResetError(104, "Connection reset by peer"), True, True),
        (EOFError(), True, True),
        (EOFError(), False, False),
        (RuntimeError("CUDA error: out of memory"), True, False),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nTraceback …"), True, False),
        (RuntimeError("Caught RuntimeError in pin memory thread for device 0.\nTraceback …"), True, False),
    ],
)
def test_which_errors_are_a_workers_death(error, dead, lost):
    assert loader._is_lost_worker(error, [types.SimpleNamespace(exitcode=-9 if dead else None)]) is lost


def test_a_killed_worker_is_replaced_where_batches_are_pinned(caplog):
    """As PyTorch behaves there: a worker is killed, and the thread that pins its batches ends."""
    whole, starts = read(), []

    def reading(start):
        starts.append(start)
        process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
        process.start()

        def batches():
            yield from whole[start : 2 if len(starts) == 1 else None]
            if len(starts) == 1:
                process.kill()
                raise PIN_THREAD
            process.kill()

        return batches()

    survived = list(loader._outliving_workers(reading))
    assert starts == [0, 2] and torch.equal(drawn(survived), drawn(whole))
    assert "a data worker was lost (RuntimeError: Pin memory thread exited unexpectedly)" in caplog.text


class Broken(Noise):
    def __getitem__(self, index):
        raise RuntimeError("broken sample")


def test_an_error_in_the_data_is_no_lost_worker():
    with pytest.raises(RuntimeError, match="broken sample"):
        read(dataset=Broken(), num_workers=1)


class Unreadable(Noise):
    def __getitem__(self, index):
        raise BadDataError("rows.csv, row 7: no such image")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_is_wrong_with_the_data_is_told_without_a_workers_traceback(num_workers):
    with pytest.raises(BadDataError, match="^rows.csv, row 7: no such image$"):
        read(dataset=Unreadable(), num_workers=num_workers)


def test_more_batches_than_an_epoch_has():
    with pytest.raises(ValueError, match="expected at most the 6 batches of an epoch, got 7"):
        read(start_batch=7)


def test_evaluation_reads_each_sample_once():
    loaders = [Loader(SampleSource(Noise(7), SamplePlan(7, 2, rank=rank, world_size=3))) for rank in range(3)]
    assert [len(of_rank) for of_rank in loaders] == [2, 1, 1]
    read = [[int(i) for batch in of_rank for i in batch["index"]] for of_rank in loaders]
    assert read == [[0, 3, 6], [1, 4], [2, 5]]


def test_a_data_set_that_makes_its_own_loader_is_found_in_a_concatenation():
    class Stream(Noise):
        def make_loader(self):
            pass

    stream = Stream()
    assert stream_of(torch.utils.data.ConcatDataset([stream])) is stream
    assert stream_of(torch.utils.data.ConcatDataset([stream, stream])) is None
    assert stream_of(Noise()) is None


class Warns(Noise):
    """As Pillow does of many files: one cause, a text for each."""

    def __getitem__(self, index):
        warnings.warn(f"photo {index} has no colour profile", stacklevel=1)
        return super().__getitem__(index)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_libraries_warn_of_is_told_once_and_counted(num_workers, caplog, monkeypatch):
    monkeypatch.setattr(loader, "_TALLY", WarningTally())
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        batches = read(dataset=Warns(), num_workers=num_workers)
    assert not any(loader._WARNINGS in batch for batch in batches)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2 and "has no colour profile" in told[0] and "; 10 of this kind so far" in told[1]
