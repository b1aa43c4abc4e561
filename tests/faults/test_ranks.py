"""One of two processes is killed: the other ends too, soon, and both go on together."""

import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LAST = "checkpoint_last.pth"
SETTINGS = dict(batch_size_train=2, save_every_n_iters=2, max_epoch=3)

# Seconds within which the rest of a run must have ended; gloo notices a closed connection at once, and torchrun gives
# 30 s of grace.
BOUND = 60


def start_ranks(place, *faults):
    """Both ranks, as torchrun starts them; the second with the faults."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return [
        place.start(*(faults[rank] if faults else []), env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]


def finish_ranks(place):
    runs = start_ranks(place)
    assert [run.wait() for run in runs] == [0, 0], runs[0].end + runs[1].end
    return place.newest()


def test_a_rank_is_killed(record, place, assert_same_run, assert_good, steps_saved):
    """Either, at random moments."""
    choose = random.Random(14)
    whole = finish_ranks(place("reference", **SETTINGS))
    killed = place("killed")
    with record.attempt("rank killed", times=4) as attempt:
        saved = 0
        for number in range(4):
            kill = {"do": "kill", "at": "step", "count": choose.randint(1, 4), "after": choose.uniform(0, 0.1)}
            runs = start_ranks(killed, *([[kill], []] if number % 2 else [[], [kill]]))
            victim, other = runs if number % 2 else reversed(runs)
            assert victim.wait() == -signal.SIGKILL, victim.end
            code = other.wait(BOUND)
            print(kill, code, other.end.splitlines()[-1])
            assert code not in (0, -signal.SIGKILL)
            steps, before = killed.steps(victim), saved
            assert not steps or steps[0] == saved + 1
            for path in killed.output_dir.glob(f"*/{LAST}"):
                assert_good(path)
                saved = max(saved, steps_saved(path))
            attempt.loses("optimizer steps computed again", max(steps, default=before) - saved)
        assert_same_run(finish_ranks(killed), whole)


def test_a_rank_under_torchrun_is_killed(record, place, tmp_path, assert_same_run, assert_good):
    """By the command a user types. Torchrun names the rank and ends the other; the same command goes on."""
    whole = finish_ranks(place("reference", **SETTINGS))
    killed = place("killed")
    killed.folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "lavis.train", "--cfg-path", killed.cfg_path]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    def torchrun():
        return subprocess.Popen(
            command, cwd=killed.folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    with record.attempt("rank killed"):
        with torchrun() as process:
            end = time.monotonic() + 120
            while not list(killed.output_dir.glob(f"*/{LAST}")):
                assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
                time.sleep(0.02)
            children = f"/proc/{process.pid}/task/{process.pid}/children"
            with open(children) as file:
                os.kill(int(file.read().split()[-1]), signal.SIGKILL)
            output, _ = process.communicate(timeout=BOUND)
        assert process.returncode != 0 and "Signal 9 (SIGKILL)" in output, output[-3000:]
        folder = killed.newest()
        assert_good(folder / LAST)
        done = subprocess.run(command, cwd=killed.folder, env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0 and f"resumed from {folder / LAST}" in done.stderr, done.stderr[-3000:]
        assert_same_run(folder, whole)
