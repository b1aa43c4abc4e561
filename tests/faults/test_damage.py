"""Damaged checkpoints: never loaded, told by name, and the newest good one is found."""

import random
import shutil

import pytest
import torch

from lavis_kvmod.runners.run_folder import checkpoint_problem
from lavis_kvmod.weights import files as checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LAST, BEST = "checkpoint_last.pth", "checkpoint_best.pth"


def flip_a_bit(path, choose, at=None):
    with open(path, "r+b") as file:
        place = int(path.stat().st_size * (choose.uniform(0.05, 0.95) if at is None else at))
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << choose.randrange(8)]))


def flip_a_bit_in_its_table(path, choose):
    flip_a_bit(path, choose, at=0.99999)


def zero_a_page(path, choose):
    with open(path, "r+b") as file:
        file.seek(choose.randrange(1, path.stat().st_size // 4096 - 1) * 4096)
        file.write(bytes(4096))


def cut(path, choose):
    with open(path, "r+b") as file:
        file.truncate(choose.randrange(1, path.stat().st_size))


def empty(path, choose):
    path.write_bytes(b"")


def garbage(path, choose):
    path.write_bytes(bytes(choose.randrange(256) for _ in range(10_000)))


def something_else(path, choose):
    torch.save({"weights": torch.zeros(3)}, path)


def a_tensor(path, choose):
    torch.save(torch.zeros(3), path)


DAMAGES = [flip_a_bit, flip_a_bit_in_its_table, zero_a_page, cut, empty, garbage, something_else, a_tensor]


@pytest.fixture()
def broken_off(place):
    """A run's reference, and the folder in which it was killed when it had saved three times."""
    settings = dict(batch_size_train=2, save_every_n_iters=2, max_epoch=1, keep_last=2)
    whole = place("reference", **settings).finish()
    killed = place("killed")
    killed.start({"do": "kill", "at": "step", "count": 7}).wait()
    return whole, killed


def test_auto_finds_the_newest_good_one(record, place, broken_off, steps_saved, assert_same_run):
    whole, killed = broken_off
    choose = random.Random(7)
    for damage in [*DAMAGES, flip_a_bit, cut]:
        again = place(f"{damage.__name__}-{choose.random()}")
        shutil.copytree(killed.output_dir, again.output_dir)
        (folder,) = again.folders()
        newest, older = steps_saved(folder / LAST), steps_saved(folder / "checkpoint_last-1.pth")
        assert (newest, older) == (6, 4)
        with record.attempt("checkpoint damaged") as attempt:
            damage(folder / LAST, choose)
            finished = again.finish()
            output = again.runs[-1].output
            print(damage.__name__, [line for line in output.splitlines() if LAST in line][0])
            assert any("[WARNING]" in line and str(folder / LAST) in line for line in output.splitlines()), output
            assert again.steps()[0] == older + 1
            attempt.loses("optimizer steps computed again", newest - older)
            assert_same_run(finished, whole)


def test_a_damaged_one_that_is_named_is_refused(record, place, broken_off):
    _, killed = broken_off
    choose = random.Random(8)
    (folder,) = killed.folders()
    for damage in DAMAGES:
        path = folder.parent.parent / f"{damage.__name__}.pth"
        shutil.copy(folder / LAST, path)
        with record.attempt("checkpoint damaged"):
            damage(path, choose)
            run = killed.start(options=[f"run.resume_ckpt_path={path}"])
            assert run.wait() == 2, run.end
            print(run.output.splitlines()[-1])
            told = run.output[run.output.index("error: ") :]
            assert str(path) in told and "Traceback" not in run.output and not killed.steps()
            assert killed.folders() == [folder]


def test_the_best_is_damaged(record, place, assert_same_run):
    """Before a test: refused. While training is still to come: the best is looked for among what comes."""
    whole = place("reference", batch_size_train=2, max_epoch=2, test_splits=["test"]).finish()
    for epochs in (2, 3):
        damaged = place(f"damaged-{epochs}")
        shutil.copytree(whole.parent, damaged.output_dir)
        (folder,) = damaged.folders()
        with record.attempt("checkpoint damaged"):
            flip_a_bit(folder / BEST, random.Random(epochs))
            run = damaged.start(options=[f"run.max_epoch={epochs}"])
            code = run.wait()
            damage = f"{folder / BEST}: damaged ("
            if epochs == 2:
                assert code == 2 and f"error: {damage}" in run.end, run.end
            else:
                assert code == 0 and damage in run.output and "the best is looked for among what comes" in run.output
                assert checkpoint_problem(folder / BEST) is None and checkpoints.read(folder / BEST)["epoch"] == 2


def test_a_flipped_bit_is_found_wherever_it_is(record, broken_off, tmp_path):
    """Or does no harm: the file has bytes that mean nothing."""
    _, killed = broken_off
    (folder,) = killed.folders()
    contents = checkpoints.read(folder / LAST)
    small = tmp_path / "small.pth"
    contents["model"] = {name: value for name, value in contents["model"].items() if value.numel() < 100}
    contents["optimizer"] = {"state": {}}
    checkpoints.save(contents, small)
    choose, path = random.Random(9), tmp_path / "flipped.pth"
    found = harmless = 0
    for _ in range(1500):
        shutil.copy(small, path)
        with record.attempt("one bit of a checkpoint flipped"):
            flip_a_bit(path, choose, at=choose.random())
            if checkpoint_problem(path) is not None:
                found += 1
                continue
            harmless += 1
            assert repr(checkpoints.read(path)) == repr(contents)
    print(f"{found} found, {harmless} harmless")
    assert found > harmless
