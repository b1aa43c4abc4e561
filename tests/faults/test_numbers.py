"""A batch that gives no number: skipped as often as allowed and told with its ids, then the run stops."""

import signal

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LAST = "checkpoint_last.pth"
SETTINGS = dict(batch_size_train=2, save_every_n_iters=2, max_epoch=3)
BAD = "what is written on scan 3?"  # in one batch an epoch
NAN = {"do": "nan", "texts": [BAD]}


def bad_steps(folder):
    return [line for line in (folder / "log.txt").read_text().splitlines() if "train_bad_step" in line]


def test_skipped_as_often_as_allowed(record, place, assert_good, assert_same_run):
    """Also where the run is killed and goes on in between: it ends as one that was not."""
    skipping = place("skipping", max_bad_steps=3, **SETTINGS)
    killed = place("killed")
    with record.attempt("NaN batch", times=3) as attempt:
        folder = skipping.finish(NAN)
        assert_good(folder / LAST)
        assert len(bad_steps(folder)) == 3 and all(BAD in line for line in bad_steps(folder))
        assert skipping.runs[0].output.count("step skipped") == 3
        assert killed.start(NAN, {"do": "kill", "at": "step", "count": 10}).wait() == -signal.SIGKILL
        assert_same_run(killed.finish(NAN), folder)
        attempt.loses("optimizer steps, those of the bad batches", 3)


@pytest.mark.parametrize("allowed", [0, 1])
def test_then_the_run_stops(record, place, assert_good, assert_same_run, steps_saved, allowed):
    """With its checkpoint intact; mended, it goes on."""
    reference = place("reference", max_bad_steps=allowed, **SETTINGS)
    whole = reference.finish()
    stopped = place("stopped")
    with record.attempt("NaN batch", times=allowed + 1) as attempt:
        run = stopped.start(NAN)
        assert run.wait() == 2, run.end
        print(run.output.splitlines()[-1])
        assert f"{allowed + 1} steps of this run were bad, and max_bad_steps is {allowed}" in run.output
        assert BAD in run.output.splitlines()[-1] and "Traceback" not in run.output
        (folder,) = stopped.folders()
        saved = 0
        if (folder / LAST).exists():
            assert_good(folder / LAST)
            saved = steps_saved(folder / LAST)
        attempt.loses("optimizer steps computed again", stopped.steps()[-1] - saved)
        folder = stopped.finish()
        assert_good(folder / LAST)
        if not allowed:
            assert_same_run(folder, whole)
        else:
            assert len(bad_steps(folder)) == allowed
            attempt.loses("optimizer steps, those of the bad batches", allowed)
