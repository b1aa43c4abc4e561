"""Two runs in one output folder: each has a run folder of its own, or is refused."""

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SETTINGS = dict(batch_size_train=2, save_every_n_iters=2, max_epoch=2)


def test_started_together(record, place, assert_same_run):
    """With `auto`, and nothing there yet."""
    whole = place("reference", **SETTINGS).finish()
    together = place("together")
    with record.attempt("two runs begun in one output folder", times=2):
        runs = [together.start() for _ in range(2)]
        assert [run.wait() for run in runs] == [0, 0], runs[0].end + runs[1].end
        assert len(together.folders()) == 2
        for folder in together.folders():
            assert_same_run(folder, whole)


def test_both_going_on_with_the_same_run(record, place, assert_same_run, tmp_path):
    whole = place("reference", **SETTINGS).finish()
    same = place("same")
    same.start({"do": "kill", "at": "step", "count": 5}).wait()
    with record.attempt("two runs going on in one run folder", times=2):
        first = same.start({"do": "wait", "at": "step", "count": 3, "for": str(tmp_path / "go")})
        first.wait_for("resumed from")
        (folder,) = same.folders()
        second = same.start()
        assert second.wait() == 2, second.end
        assert f"error: {folder} is in use by another run (process {first.pid} on " in second.output
        assert "Traceback" not in second.output and not same.steps(second)
        # One that looked for its checkpoint while the first was writing, and gets the folder when that ends.
        third = same.start()
        third.wait_for("waiting up to")
        (tmp_path / "go").touch()
        assert first.wait() == 0, first.end
        assert third.wait() == 0, third.end
        assert not same.steps(third)
        assert same.folders() == [folder]
        assert_same_run(folder, whole)


def test_a_new_run_while_one_goes_on(record, place, assert_same_run, tmp_path):
    """It tidies up what killed runs left, and leaves the files of the one at work alone."""
    whole = place("reference", **SETTINGS).finish()
    place_ = place("both")
    with record.attempt("two runs begun in one output folder", times=2):
        first = place_.start({"do": "wait", "at": "bytes", "count": 1000, "for": str(tmp_path / "go")})
        first.wait_for("no run in")
        while not list(place_.output_dir.glob("*/.*.tmp")):
            assert first.code is None
        second = place_.start(options=["run.resume_ckpt_path=null"])
        assert second.wait() == 0, second.end
        (tmp_path / "go").touch()
        assert first.wait() == 0, first.end
        for folder in place_.folders():
            assert_same_run(folder, whole)
