"""SIGTERM and Ctrl-C save first; real signals, to this process."""

import os
import signal

import pytest

from lavis_kvmod.commands.train import train
from lavis_kvmod.runners.signals import Stopped, StopSignals
from lavis_kvmod.weights import files as checkpoints


def send(signum):
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_is_remembered_a_ctrl_c_after_it_stops_at_once(first):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        send(first)
        send(signal.SIGTERM)  # torchrun passes a Ctrl-C on, and asks again: no reason to lose what can be saved
        assert signals.received == first
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_where_nothing_is_to_be_saved_the_first_stops():
    with StopSignals() as signals:
        with pytest.raises(Stopped) as stopped, signals.nothing_to_save():
            send(signal.SIGTERM)
        assert stopped.value.code == 128 + 15
        with pytest.raises(Stopped), signals.nothing_to_save():  # one that came before
            pytest.fail("went on")


@pytest.mark.parametrize(
    ("signum", "exit_code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_signal_saves_after_the_step_and_the_run_goes_on_from_there(
    write_run, in_process, runs, killed_before_step, assert_same_run, signum, exit_code
):
    path = write_run(max_epoch=1, accum_grad_iters=2, valid_splits=[], resume_ckpt_path="auto")
    assert in_process(lambda: train(path), "whole")[0] == 0
    code, output = in_process(killed_before_step(path, 1, signum=signum), "stopped")
    assert code == exit_code and f"{signum.name}: saving after this step, then stopping" in output
    (folder,) = runs("stopped")
    assert checkpoints.read(folder / "checkpoint_last.pth")["state"]["batch"] == 4  # behind the second step
    assert in_process(lambda: train(path), "stopped")[0] == 0
    assert_same_run(folder, runs("whole")[0])


def test_in_an_epochs_last_step_no_other_is_begun(write_run, in_process, runs, killed_before_step):
    path = write_run(valid_splits=[])
    code, output = in_process(killed_before_step(path, 6, signum=signal.SIGTERM))
    state = checkpoints.read(runs()[0] / "checkpoint_last.pth")["state"]
    assert (code, state["epoch"], state["batch"]) == (143, 1, 0), output


@pytest.mark.slow
def test_sigterm_while_validating_stops_at_once_and_costs_nothing(write_run, in_process, runs, assert_same_run):
    path = write_run(max_epoch=1, resume_ckpt_path="auto")

    def stopped():
        from lavis_kvmod.tasks.vqa import KVModVQATask

        KVModVQATask.valid_step = lambda self, **kwargs: send(signal.SIGTERM)
        train(path)

    assert in_process(stopped, "stopped")[0] == 128 + 15
    (folder,) = runs("stopped")
    assert checkpoints.read(folder / "checkpoint_last.pth")["state"]["trained"]
    code, output = in_process(lambda: train(path), "stopped")
    assert code == 0 and "at epoch 0, batch 7" in output
    assert in_process(lambda: train(path), "whole")[0] == 0
    assert_same_run(folder, runs("whole")[0])
