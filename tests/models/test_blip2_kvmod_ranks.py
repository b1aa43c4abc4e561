"""Two processes with batch b learn from stage 1's objectives as one with 2b does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import stage_1_rank
import torch

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])}
    script = str(SUPPORT / "stage_1_rank.py")
    command = [sys.executable, "-W", "ignore", script]
    started = [subprocess.Popen([*command, rank, "2", str(folder)], env=env) for rank in ("0", "1")]
    stage_1_rank.main(0, 1, folder)
    assert [process.wait(timeout=240) for process in started] == [0, 0]
    return torch.load(folder / "of-1.pth"), torch.load(folder / "of-2.pth")


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["itc", "itm", "itg", "mlm", "momentum", "momentum of words"])
def test_two_ranks_are_one_with_twice_the_batch(results, objective):
    one, two = (result[objective] for result in results)  # in float64: what is compared is the arithmetic
    assert one.keys() == two.keys() and len(one) > 30
    for name in one:
        assert (one[name] - two[name]).abs().max() <= 1e-6, name
