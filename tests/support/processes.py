"""Runs in processes of their own, which may be killed. Fixtures for the conftest.py files that import them."""

import multiprocessing
import os
import signal
import sys
import traceback
from pathlib import Path

import pytest
import torch

from lavis_kvmod.commands.train import train

__all__ = ["in_process", "killed_before_step", "runs"]


def _child(function, folder, output):
    os.setpgrp()  # so that it can be ended with all its own processes
    os.makedirs(folder, exist_ok=True)
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)  # pytest had put its own there
    try:
        function()
        code = 0
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@pytest.fixture()
def in_process(tmp_path):
    """A function: run something in a second process, in a folder; gives its exit code (negative: the signal that killed
    it) and what it wrote. Forked, so that LAVIS need not be imported again."""

    def run(function, folder="."):
        output = tmp_path / "process.txt"
        output.unlink(missing_ok=True)
        process = multiprocessing.get_context("fork").Process(target=_child, args=(function, tmp_path / folder, output))
        process.start()
        process.join(120)
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"still running after 120 s:\n{output.read_text()}")
        return process.exitcode, output.read_text()

    return run


@pytest.fixture()
def runs(tmp_path):
    """A function: the run folders in ``folder/output``, in order of their names."""

    def find(folder=".") -> list:
        return sorted(p for p in (Path(tmp_path) / folder / "output").iterdir() if p.is_dir())

    return find


def _killed_before_step(path, step, options=(), signum=signal.SIGKILL):
    """What a child process does: train, and send itself a signal before optimizer step ``step`` (from 0)."""

    def run():
        take, taken = torch.optim.AdamW.step, []

        def step_or_die(self, *args, **kwargs):
            if len(taken) == step:
                os.kill(os.getpid(), signum)
            taken.append(1)
            return take(self, *args, **kwargs)

        torch.optim.AdamW.step = step_or_die
        train(path, list(options))

    return run


@pytest.fixture()
def killed_before_step():
    """A function: what a child process does that trains, and is sent a signal before optimizer step n (from 0)."""
    return _killed_before_step
