"""SIGKILL at any moment, and `resume_ckpt_path: auto`: the run ends as if nothing had happened."""

import random
import signal
import time

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LAST = "checkpoint_last.pth"
SAMPLES, EPOCHS = 13, 3

# With workers, a step over two batches, and more checkpoints than one.
PLAIN = dict(batch_size_train=2, save_every_n_iters=2)
BUSY = dict(batch_size_train=2, accum_grad_iters=2, save_every_n_iters=4, num_workers=2, keep_last=3)

KILLS = {"step": 8, "write": 8, "evaluate": 5, "start": 5, "any": 8}


class Campaign:
    """A run that is killed again and again, each time going on by `auto`; ended, it is compared with one that was let
    alone, and another is begun.

    Args:
        fault: its name in the record.
        settings: of the run.
        record, place, steps_saved, assert_good, assert_same_run: the fixtures.
    """

    def __init__(self, fault, settings, record, place, steps_saved, assert_good, assert_same_run):
        self._fault, self._record, self._place = fault, record, place
        self._steps_saved, self._assert_good, self._assert_same_run = steps_saved, assert_good, assert_same_run
        accumulate = settings.get("accum_grad_iters", 1)
        batches = -(-SAMPLES // settings["batch_size_train"])
        self.steps = EPOCHS * -(-batches // accumulate)
        self._steps_between_saves = settings["save_every_n_iters"] // accumulate
        self.reference = place("reference", max_epoch=EPOCHS, **settings)
        self.whole = self.reference.finish()

    def run(self, kills):
        """Go through ``kills``: each is a fault of inject.py without ``do``, or a number of seconds to wait before this
        process does it."""
        kills, number = list(kills), 0
        while kills:
            number += 1
            with self._record.attempt(self._fault, times=0) as attempt:
                self._run_one(self._place(f"killed-{number}"), kills, attempt)

    def _run_one(self, place, kills, attempt):
        saved, run = 0, None
        while kills:
            kill = kills.pop(0)
            run = self._start(place, kill)
            code, steps = run.wait(), place.steps()
            print(f"{self._fault}: {kill}: exit code {code}, steps {steps}, {saved} had been saved")
            if steps:  # it went on exactly behind the last checkpoint
                assert steps == list(range(saved + 1, saved + 1 + len(steps)))
            if code == 0:
                break
            assert code == -signal.SIGKILL, run.end
            attempt.times += 1
            newest = max((self._steps_saved(f) for f in place.output_dir.glob(f"*/{LAST}")), default=0)
            again = max(steps, default=saved) - newest
            assert newest >= saved and again <= self._steps_between_saves
            attempt.loses("optimizer steps computed again", again)
            saved = newest
        if run.wait() != 0:
            place.finish()
            assert not place.steps() or (place.steps()[0], place.steps()[-1]) == (saved + 1, self.steps)
        folder = place.newest()
        self._assert_good(folder / LAST)
        self._assert_same_run(folder, self.whole)
        left = [path.name for path in folder.rglob("*") if path.name.endswith(".tmp") or "next" in path.name]
        assert not left

    @staticmethod
    def _start(place, kill):
        if isinstance(kill, dict):
            return place.start({"do": "kill", **kill})
        run = place.start()
        time.sleep(kill)
        run.kill(group=True)
        return run


@pytest.fixture()
def campaign(record, place, steps_saved, assert_good, assert_same_run):
    """A function: a `Campaign` by the fault's name and the run's settings."""
    return lambda fault, settings: Campaign(fault, settings, record, place, steps_saved, assert_good, assert_same_run)


@pytest.mark.parametrize("settings", [PLAIN, BUSY], ids=["plain", "busy"])
def test_killed_in_training(campaign, settings):
    choose = random.Random(1)
    kills = [
        {
            "at": "step",
            "count": choose.randint(1, 4),
            "after": choose.uniform(0, 0.1),
            "what": choose.choice(["run", "group"]),
        }
        for _ in range(KILLS["step"] // 2)
    ]
    campaign("killed in a training step", settings).run(kills)


def test_killed_while_writing(campaign):
    """In the middle of a file, or between any two calls that sync or rename."""
    choose = random.Random(2)
    killed = campaign("killed while a checkpoint is written", PLAIN)
    size = (killed.whole / LAST).stat().st_size
    kills = [{"at": "bytes", "count": choose.randint(1, 4 * size)} for _ in range(KILLS["write"] // 2)]
    kills += [{"at": "file", "count": choose.randint(1, 40)} for _ in range(KILLS["write"] // 2)]
    choose.shuffle(kills)
    killed.run(kills)


def test_killed_while_evaluating(campaign):
    choose = random.Random(3)
    kills = [
        {"at": "evaluate", "count": choose.randint(1, 2), "after": choose.uniform(0, 0.05)}
        for _ in range(KILLS["evaluate"])
    ]
    campaign("killed in an evaluation", PLAIN).run(kills)


def test_killed_at_start_up(campaign):
    """While a resumed run reads its config, builds the model, reads the checkpoint."""
    choose = random.Random(4)
    killed = campaign("killed while starting up again", PLAIN)
    starting = killed.reference.seconds("start", "step")
    kills = [{"at": "step", "count": 4}]
    kills += [{"at": "start", "after": choose.uniform(0, starting)} for _ in range(KILLS["start"])]
    killed.run(kills)


def test_killed_at_any_moment(campaign):
    """From outside, by the clock, with all that it has started."""
    choose = random.Random(5)
    killed = campaign("killed at any moment", BUSY)
    whole = killed.reference.seconds("start", "end")
    killed.run(choose.uniform(0, whole) for _ in range(KILLS["any"]))
