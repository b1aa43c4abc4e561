"""A clock that leaps: what is newest, how long it takes and what a folder is called do not depend on it."""

import json
import os
import random
import re
import signal

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LAST = "checkpoint_last.pth"
SETTINGS = dict(batch_size_train=2, save_every_n_iters=2, keep_last=3, max_epoch=2, log_freq=1)


def scramble_times(folder, choose):
    """Of the last change: files copied, restored from a backup, written on machines with clocks of their own."""
    for path in folder.rglob("*"):
        os.utime(path, (choose.uniform(0, 2e9),) * 2)


def test_the_clock_leaps(record, place, assert_same_run):
    """Whenever it is read, by up to ten days; files' times are random."""
    choose = random.Random(10)
    whole = place("reference", **SETTINGS).finish()
    leaping = place("leaping")
    with record.attempt("clock set to and fro", times=4):
        for number in range(3):
            run = leaping.start(
                {"do": "clock", "jumps": number, "shift": choose.uniform(-1e9, 1e9)},
                {"do": "kill", "at": "step", "count": 4},
            )
            assert run.wait() == -signal.SIGKILL, run.end
            scramble_times(leaping.output_dir, choose)
        folder = leaping.finish({"do": "clock", "jumps": 4, "shift": -1e9})
        assert_same_run(folder, whole)
        etas = re.findall(r"eta (\S+)", "".join(run.output for run in leaping.runs))
        assert len(etas) >= 14 and all(re.fullmatch(r"0:0\d:\d\d", eta) for eta in etas), etas
        facts = [json.loads(line) for line in (folder / "timing.txt").read_text().splitlines()]
        assert all(0 <= fact["hours_to_go"] < 0.1 and fact["samples_per_second"] > 0 for fact in facts)


def test_the_newest_run_is_the_one_begun_last(record, place, assert_same_run):
    """Also when the clock was set back by a year in between, and its name and files seem older."""
    whole = place("reference", **SETTINGS).finish()
    back = place("back")
    with record.attempt("clock set to and fro", times=2):
        for shift in (0, -365 * 86400):
            run = back.start(
                {"do": "clock", "shift": shift},
                {"do": "kill", "at": "step", "count": 6},
                options=["run.resume_ckpt_path=null"],
            )
            assert run.wait() == -signal.SIGKILL
        older, newer = reversed(back.folders())
        scramble_times(newer, random.Random(11))
        back.finish()
        assert f"resumed from {newer / LAST}" in back.runs[-1].output
        assert not (older / "checkpoint_best.pth").exists()
        assert_same_run(newer, whole)


def test_names_do_not_collide(record, place, assert_same_run):
    """Four runs begun together, at a moment that does not pass."""
    whole = place("reference", **SETTINGS).finish()
    together = place("together")
    with record.attempt("runs begun in the same second", times=4):
        runs = [
            together.start({"do": "freeze clock", "at": 1.7e9}, options=["run.resume_ckpt_path=null"]) for _ in range(4)
        ]
        assert [run.wait() for run in runs] == [0] * 4, runs[0].end
        assert len(together.folders()) == 4
        for folder in together.folders():
            assert_same_run(folder, whole)
