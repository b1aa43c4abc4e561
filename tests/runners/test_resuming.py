"""Resuming where something is not as it was."""

import hashlib

import pytest
import torch
from omegaconf import OmegaConf

from lavis_kvmod.commands.train import train
from lavis_kvmod.runners import resuming
from lavis_kvmod.runners.runner_kvmod import RunnerKVMod
from lavis_kvmod.runners.training_state import RunState, get_rng_state, set_rng_state
from lavis_kvmod.weights import files as checkpoints
from lavis_kvmod.weights.files import CheckpointError

CPU = torch.device("cpu")
ORDER = {"seed": 1, "num_samples": 100, "num_batches": 25, "global_batch": 4, "readers": None, "accum_grad_iters": 1}


def position(before, now, batch=10):
    state = RunState(epoch=3, batch=batch, samples=40, loss_sum=7.0, best_epoch=2)
    resuming.find_position(state, before, now)
    return state.epoch, state.batch, state.samples


@pytest.mark.parametrize(
    ("changed", "found", "told"),
    [
        ({}, 10, ""),
        ({"global_batch": 8, "num_batches": 13}, 5, ""),  # twice the processes: half the batches
        ({"global_batch": 3, "num_batches": 34}, 13, "1 samples of epoch 3 will be seen twice"),
        ({"accum_grad_iters": 4}, 8, "8 samples of epoch 3 will be seen twice"),
        ({"seed": 2}, 0, "epoch 3 begins anew"),
        ({"num_samples": 99}, 0, "epoch 3 begins anew"),
        ({"readers": [2, 4]}, 0, "epoch 3 begins anew"),
    ],
)
def test_position_after_a_change(changed, found, told, caplog):
    epoch, batch, samples = position(ORDER, {**ORDER, **changed})
    twice = int(told.split()[0]) if "twice" in told else 0
    assert (epoch, batch, samples) == (3, found, 40 - twice if found else 0)
    assert told in caplog.text and bool(told) == bool(caplog.text)


def test_changes_name_what_matters_with_both_values():
    old = {"run": {"init_lr": 0.1, "max_epoch": 3, "wandb": {"project": "a"}}, "model": {"prefix_gate": "none"}}
    new = {"run": {"init_lr": 0.2, "max_epoch": 5, "amp": "bf16"}, "model": {"prefix_gate": "tanh"}}
    assert resuming.changes(old, new) == [
        "model.prefix_gate: none -> tanh",
        "run.amp: (not there) -> bf16",
        "run.init_lr: 0.1 -> 0.2",
        "run.max_epoch: 3 -> 5",  # cosine rates end there
    ]


def test_randomness_comes_back(tmp_path):
    checkpoints.save(get_rng_state(CPU), tmp_path / "rng.pth")

    def draw():
        import random

        import numpy as np

        return [random.gauss(0, 1), np.random.randn(), torch.rand(()).item()]

    draw()  # leaves a second Gaussian number waiting in Python's and in NumPy's generator
    checkpoints.save(get_rng_state(CPU), tmp_path / "rng.pth")
    first = draw() + draw()
    set_rng_state(checkpoints.read(tmp_path / "rng.pth"), CPU)
    assert draw() + draw() == first


def test_an_optimizer_keeps_the_run_files_settings_and_tells_what_does_not_fit():
    def make(scale, parameters=1):
        weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(parameters)]
        return torch.optim.AdamW([{"params": weights, "lr_scale": scale}], lr=1.0)

    old, new = make(1.0), make(5.0)
    old.param_groups[0]["params"][0].grad = torch.ones(2)
    old.step()
    resuming.load_optimizer(new, old.state_dict(), "c.pth")
    assert new.param_groups[0]["lr_scale"] == 5.0 and new.state_dict()["state"][0]["step"] == 1
    with pytest.raises(CheckpointError, match="c.pth: its optimizer does not fit this model"):
        resuming.load_optimizer(make(1.0, parameters=2), old.state_dict(), "c.pth")


def test_a_file_without_a_run_in_it_is_refused():
    with pytest.raises(CheckpointError, match="w.pth: a run cannot go on from it, it lacks optimizer, epoch"):
        resuming.check({"model": {}}, "w.pth")


@pytest.mark.slow
def test_by_path_into_a_new_folder(write_run, runs, capsys):
    """The log and the best checkpoint come along; what was changed is told; without the best the search begins anew."""
    path = write_run(max_epoch=1)
    train(path)
    (first,) = runs()
    capsys.readouterr()
    options = [f"run.resume_ckpt_path={first / 'checkpoint_last.pth'}", "run.weight_decay=0.1", "run.max_epoch=1"]
    train(path, options)
    second = runs()[-1]
    assert second != first and "run.weight_decay: 0.05 -> 0.1" in capsys.readouterr().err
    assert (second / "log.txt").read_text() == (first / "log.txt").read_text()
    best = [(folder / "checkpoint_best.pth").read_bytes() for folder in (first, second)]
    assert best[0] == best[1]


def test_by_url_with_a_sum(served, tmp_path):
    checkpoints.save({"model": {}, "optimizer": {}, "epoch": 0}, served.folder / "last.pth")
    digest = hashlib.sha256((served.folder / "last.pth").read_bytes()).hexdigest()

    def open_folder(source):
        run = {"output_dir": str(tmp_path / "output"), "evaluate": False, "resume_ckpt_path": source}
        return RunnerKVMod.open_folder(OmegaConf.create(run))

    for source in (served.folder / "last.pth", f"{served.url}/last.pth"):
        found = open_folder(f"{source}#sha256={digest}").checkpoint
        assert found.read_bytes() == (served.folder / "last.pth").read_bytes()
        with pytest.raises(CheckpointError, match="last.pth is not the file that was meant"):
            open_folder(f"{source}#sha256={'0' * 64}")


def test_the_best_is_looked_for_beside_the_checkpoint(tmp_path, caplog):
    """It is the one of the epoch that the checkpoint speaks of, or the checkpoint itself; not some other."""
    old, new = tmp_path / "old", tmp_path / "new"
    state, target = RunState(epoch=3, best_epoch=1), new / "checkpoint_best.pth"
    checkpoints.save({"epoch": 2, "best_epoch": 1}, old / "checkpoint_last.pth")
    checkpoints.save({"model": {}, "optimizer": {}, "epoch": 0, "best_epoch": 0}, old / "checkpoint_best.pth")
    assert not resuming.bring_best(state, old / "checkpoint_last.pth", target) and not target.exists()
    assert "the best checkpoint so far (epoch 1) is not beside" in caplog.text
    checkpoints.save({"model": {}, "optimizer": {}, "epoch": 1, "best_epoch": 1}, old / "checkpoint_best.pth")
    assert resuming.bring_best(state, old / "checkpoint_last.pth", target)
    assert target.read_bytes() == (old / "checkpoint_best.pth").read_bytes()


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again(write_run, runs, capsys):
    path = write_run(max_epoch=1, resume_ckpt_path="auto", test_splits=["val"])
    train(path)
    told = capsys.readouterr().err
    assert "no run in" in told and "starting a new one" in told
    (folder,) = runs()
    before = {name: (folder / name).read_bytes() for name in ("checkpoint_last.pth", "log.txt")}
    logs = train(path)
    assert runs() == [folder] and "is trained: all 1 epochs are done; only testing it" in capsys.readouterr().err
    assert "agg_metrics" in logs["val"]
    assert {name: (folder / name).read_bytes() for name in before} == before
