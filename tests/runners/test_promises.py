"""What a run promises beside resuming: numerics, early stopping, bad samples, logs."""

import json
import subprocess
from functools import partial

import pytest
import torch
from omegaconf import OmegaConf

from lavis_kvmod import Blip2OPTKVMod
from lavis_kvmod.commands.launch import build_runner, load_config
from lavis_kvmod.commands.train import main, train
from lavis_kvmod.datasets.bad_samples import BadDataError
from lavis_kvmod.runners import epochs, run_log
from lavis_kvmod.runners.environment import git_revision
from lavis_kvmod.runners.pace import Pace
from lavis_kvmod.runners.training_state import get_rng_state, set_rng_state
from lavis_kvmod.system.schema import ConfigurationError
from lavis_kvmod.tasks.vqa import KVModVQATask
from lavis_kvmod.weights import files as checkpoints

LAST = "checkpoint_last.pth"


def log_lines(folder):
    text = (folder / "log.txt").read_text()
    return [json.loads(line) for line in text[text.index("\n}\n") + 3 :].splitlines()]


@pytest.fixture()
def bad_at(monkeypatch):
    """A function: make the loss of these training batches (from 0) NaN."""

    def make(*numbers):
        forward, calls = Blip2OPTKVMod.forward, []

        def broken(self, samples):
            output = forward(self, samples)
            calls.extend([1] * self.training)
            bad = self.training and len(calls) - 1 in numbers
            return {**output, "loss": output["loss"] * float("nan")} if bad else output

        monkeypatch.setattr(Blip2OPTKVMod, "forward", broken)

    return make


def test_bad_steps_are_skipped_so_many_times_and_then_end_the_run(write_run, runs, bad_at, capsys):
    bad_at(1, 4)
    train(write_run(max_epoch=1, max_bad_steps=2, valid_splits=[]))
    lines = log_lines(runs()[0])
    assert [line["train_batch"] for line in lines if "train_bad_step" in line] == [1, 4]
    assert "the loss is nan (" in lines[0]["train_bad_step"] and "scan" in lines[0]["train_bad_step"]
    assert checkpoints.read(runs()[0] / LAST)["state"]["bad_steps"] == 2
    assert "step skipped (1 of at most 2)" in capsys.readouterr().err


def test_the_checkpoint_of_a_run_that_ends_so_is_intact(write_run, runs, bad_at, capsys):
    bad_at(3, 4)
    path = write_run(max_epoch=1, max_bad_steps=1, valid_splits=[], save_every_n_iters=1)
    assert main(["--cfg-path", path]) == 2
    assert "in epoch 0, batch 4; 2 steps of this run were bad, and max_bad_steps is 1" in capsys.readouterr().err
    saved = checkpoints.read(runs()[0] / LAST)
    assert saved["state"]["batch"] == 4 and all(torch.isfinite(value).all() for value in saved["model"].values())


def test_a_parameter_that_is_not_finite_is_never_saved(write_run, runs):
    runner = build_runner(load_config(write_run()))
    runner._save_checkpoint(0)
    before = (runs()[0] / LAST).read_bytes()
    runner.model.query_tokens.data[0, 0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match="query_tokens is not finite: not saved"):
        runner._save_checkpoint(0)
    assert (runs()[0] / LAST).read_bytes() == before


def test_no_frozen_weight_and_no_buffer_is_saved(write_run, runs):
    runner = build_runner(load_config(write_run()))
    runner._save_checkpoint(0)
    trained = {name for name, p in runner.model.named_parameters() if p.requires_grad}
    saved = checkpoints.read(runs()[0] / LAST)
    assert set(saved["model"]) == trained and len(trained) < len(runner.model.state_dict())


def test_deterministic_computes_only_what_gives_the_same_bits(write_run, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        build_runner(load_config(write_run(deterministic=True))).train_epoch(0)
        assert torch.are_deterministic_algorithms_enabled()
        import os

        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        build_runner(load_config(write_run()))
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.slow
def test_what_is_deterministic_comes_twice_the_same(write_run, runs, assert_same_run):
    try:
        for name in ("first.yaml", "second.yaml"):
            train(write_run(name=name, deterministic=True))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_run(*runs())


def test_the_scaler_is_saved_and_taken_up(write_run, runs):
    first, second = (build_runner(load_config(write_run())) for _ in range(2))
    first._scaler, second._scaler = (torch.amp.GradScaler("cpu", init_scale=scale) for scale in (8.0, 2.0))
    first._save_checkpoint(0)
    second._load_checkpoint(str(first.output_dir / LAST))
    assert second.scaler.get_scale() == 8.0


def test_the_gpus_randomness_is_kept_too(monkeypatch):
    """Which generator is asked, and told: a GPU is not needed for that."""
    gpu, told = torch.device("cuda", 1), []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: f"of {device}")
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: told.append((state, device)))
    set_rng_state(get_rng_state(gpu), gpu)
    assert told == [("of cuda:1", gpu)]
    set_rng_state(get_rng_state(torch.device("cpu")), gpu)
    set_rng_state(get_rng_state(gpu), torch.device("cpu"))
    assert len(told) == 1


@pytest.mark.slow
def test_patience_ends_a_run_that_no_longer_gets_better(write_run, runs, monkeypatch):
    values = iter([1.0, 3.0, 2.0, 3.0, 9.0])
    monkeypatch.setattr(KVModVQATask, "after_evaluation", lambda self, **kw: {"agg_metrics": next(values)})
    path = write_run(max_epoch=5, patience=2, resume_ckpt_path="auto")
    train(path)
    saved = checkpoints.read(runs()[0] / LAST)
    assert (saved["epoch"], saved["best_epoch"]) == (3, 1)
    train(path)  # no epoch more: patience is remembered
    assert checkpoints.read(runs()[0] / LAST)["epoch"] == 3


def test_patience_ends_a_run_that_never_had_a_metric(write_run, runs, monkeypatch, capsys):
    monkeypatch.setattr(KVModVQATask, "after_evaluation", lambda self, **kw: {"agg_metrics": float("nan")})
    train(write_run(max_epoch=5, patience=2))
    assert checkpoints.read(runs()[0] / LAST)["epoch"] == 1
    assert "stopping early: 2 validations without a metric that is a finite number" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_is_not_finite_is_never_the_best(write_run, runs, monkeypatch, caplog, value):
    values = iter([value, 1.0])
    monkeypatch.setattr(KVModVQATask, "after_evaluation", lambda self, **kw: {"agg_metrics": next(values)})
    runner = build_runner(load_config(write_run()))
    assert [runner.validate(epoch) for epoch in range(2)] == [False, True]
    assert (runner.state.best_epoch, runner.state.best_agg_metric) == (1, 1.0)


def test_patience_without_validations_is_told(write_run):
    with pytest.raises(ConfigurationError, match="run.patience: it counts validations, and run.valid_splits is empty"):
        load_config(write_run(patience=2, valid_splits=[]))


def test_the_prefix_generator_learns_at_its_own_rate(write_run, runs):
    train(write_run(max_epoch=1, kv_lr_scale=10, valid_splits=[], warmup_steps=0))
    (line,) = log_lines(runs()[0])
    assert float(line["train_lr"]) == 1e-3 and set(line["train_lrs"].values()) == {"1.000e-02"}
    assert all(name.startswith("kv_prefix") for name in line["train_lrs"])
    groups = checkpoints.read(runs()[0] / LAST)["optimizer"]["param_groups"]
    assert {(g["name"].startswith("kv_prefix"), g["lr"]) for g in groups} == {(True, 1e-2), (False, 1e-3)}


def test_the_vits_layers_learn_at_rates_of_their_own(write_run, runs):
    train(write_run({"freeze_vit": False}, max_epoch=1, lr_layer_decay=0.5, valid_splits=[], warmup_steps=0))
    groups = checkpoints.read(runs()[0] / LAST)["optimizer"]["param_groups"]
    rates = {group["name"]: group["lr"] for group in groups if group["name"].startswith("vit_layer_")}
    layers = {int(name.split("_")[2]) for name in rates}
    assert {0, 1, 2} <= layers  # embeddings and two blocks
    assert all(rate == pytest.approx(1e-3 * 0.5 ** (3 - int(name.split("_")[2]))) for name, rate in rates.items())
    (line,) = log_lines(runs()[0])
    assert {name for name in rates if "vit_layer_3" not in name} == set(line["train_lrs"])


@pytest.mark.parametrize("limit", [None, 1e-3])
def test_gradients_are_clipped_to_the_run_files_norm(write_run, runs, monkeypatch, limit):
    """What the optimizer is given; the log has the norms before clipping."""
    take, norms = torch.optim.AdamW.step, []

    def step(self, *args, **kwargs):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())
        return take(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train(write_run(max_epoch=1, valid_splits=[], max_grad_norm=limit))
    (line,) = log_lines(runs()[0])
    largest = float(line["train_grad_norm_max"])
    assert len(norms) == 7 and largest > 0.1
    assert max(norms) == pytest.approx(largest if limit is None else limit, rel=1e-2)


@pytest.mark.parametrize("keep", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_as_many_checkpoints_as_the_run_file_says_are_kept(write_run, runs, keep):
    train(write_run(max_epoch=1, valid_splits=[], keep_last=keep, save_every_n_iters=1))
    kept = {path.name for path in runs()[0].glob("checkpoint_last*")}
    assert kept == {LAST, *(f"checkpoint_last-{i}.pth" for i in range(1, keep))}


def test_a_multiplier_that_the_model_does_not_know_is_refused():
    from lavis_kvmod.runners.optimizers import build_optimizer

    run = OmegaConf.create({"weight_decay": 0.1, "init_lr": 0.1, "kv_lr_scale": 2})
    with pytest.raises(ValueError, match="run.kv_lr_scale: Linear has no such parameter groups"):
        build_optimizer(torch.nn.Linear(1, 1), run)
    run.kv_lr_scale = None
    assert build_optimizer(torch.nn.Linear(1, 1), run) is None  # LAVIS's groups then


def add_bad_samples(runner, texts, share):
    """As a data set with ``on_bad_sample: skip`` gives them: lines of text in the batch."""
    runner.dataloaders  # noqa: B018  (they are made here)
    dataset = runner.datasets["train"]
    collate, dataset.max_bad_share = dataset.collater, share
    runner._dataloaders = None
    runner.datasets = {name: {split: runner.datasets[split]} for name, split in (("a", "train"),)}
    dataset.collater = lambda samples: {**collate(samples), "bad_samples": list(texts)}


def test_samples_that_cannot_be_read_are_counted_and_reported(write_run, runs, capsys):
    runner = build_runner(load_config(write_run(valid_splits=[], max_epoch=1)))
    add_bad_samples(runner, ["train.csv, row 7: no image"], share=0.5)
    runner.train()
    assert log_lines(runs()[0])[0]["train_bad_samples"] == 1  # one, however often it was met
    assert "epoch 0: 1 of 13 samples could not be read and were skipped" in capsys.readouterr().err


def test_those_met_before_a_resume_count_too(write_run):
    runner = build_runner(load_config(write_run(valid_splits=[])))
    runner.dataloaders  # noqa: B018  (they are made here)
    runner.state.samples, runner.state.bad_samples = 10, ["row 7"]
    counter = runner._count_bad_samples()
    assert (counter.num_bad, counter.num_seen) == (1, 10)


def test_too_many_of_them_end_the_run(write_run):
    runner = build_runner(load_config(write_run(valid_splits=[], max_epoch=1)))
    add_bad_samples(runner, ["row 7", "row 8"], share=0.1)
    with pytest.raises(BadDataError, match="2 of 13 samples could not be read, more than max_bad_share: 0.1"):
        runner.train()


def test_what_is_written_beside_the_checkpoints(write_run, runs, tmp_path):
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True)
    train(write_run(max_epoch=1, log_freq=3))
    folder = runs()[0]
    config = OmegaConf.load(folder / "config.yaml")
    assert config.run.lr_sched == "linear_warmup_cosine_lr" and config.run.min_lr == 0  # defaults too
    (start,) = json.loads((folder / "environment.json").read_text())["starts"]
    assert start["versions"]["torch"] == torch.__version__ and start["versions"]["salesforce-lavis"] == "1.0.2"
    assert start["git"]["here"] == git_revision(tmp_path) and len(start["git"]["here"]) == 40
    lines = log_lines(folder)
    assert 0 < float(lines[0]["train_prefix_attention_share"]) < 1 and float(lines[0]["train_grad_norm"]) > 0
    timing = [json.loads(line) for line in (folder / "timing.txt").read_text().splitlines()]
    assert [line["batch"] for line in timing] == [3, 6, 7]
    assert {"samples_per_second", "data_wait_share", "hours_to_go", "memory_gib", "loss", "lr"} <= set(timing[0])
    assert all(0 < line["matrix_peak_share"] < 1 and line["images_per_second"] > 0 for line in timing)


@pytest.mark.slow
def test_the_profiler_looks_at_some_batches(write_run, runs, capsys):
    train(write_run(max_epoch=1, valid_splits=[], profiler={"skip": 2, "batches": 2}, log_peak_memory=True))
    (table,) = (runs()[0] / "profile").glob("operators-rank0.txt")
    assert "aten::addmm" in table.read_text()
    trace = json.loads((runs()[0] / "profile" / "trace-rank0.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"ProfilerStep#2", "ProfilerStep#3"} <= names and "ProfilerStep#4" not in names
    said = capsys.readouterr().err
    assert "epoch 0: at most" in said and " images/s, " in said
    with pytest.raises(ConfigurationError, match="profiler: skip: expected"):
        load_config(write_run(profiler={"skip": 0}))


@pytest.mark.slow
def test_the_share_leaves_the_runs_randomness_alone(write_run, runs, monkeypatch):
    """Also where a model draws numbers to tell it."""
    train(write_run(max_epoch=1, valid_splits=[]))
    monkeypatch.setattr(Blip2OPTKVMod, "prefix_attention_share", lambda self, samples: torch.rand(()).item())
    train(write_run(max_epoch=1, valid_splits=[]))
    first, second = (checkpoints.read(folder / LAST)["rng"][0]["torch"] for folder in runs())
    assert torch.equal(first, second)


def test_pace_by_a_clock_of_its_own():
    now = iter([0, 1, 4, 6, 7, 8])
    pace = Pace(total=12, done=2, samples=10, clock=lambda: next(now))
    for _ in range(2):
        pace.got_data()  # after 1 s, after 2 s
        pace.done_batch(images=2)
        pace.ask_for_data()  # after 3 s, after 1 s
    facts = pace.facts(26, torch.device("cpu"), peak_share_of=0.1)
    assert facts["images_per_second"] == 0.5 and facts["matrix_peak_share"] == 0.2
    assert facts["samples_per_second"] == 2.0 and facts["hours_to_go"] == round(8 * 8 / 2 / 3600, 3)
    assert facts["data_wait_share"] == round(3 / 8, 3)


def test_writing_a_checkpoint_is_not_waiting_for_data(write_run, runs, monkeypatch):
    """By a clock that goes on only while one is written."""
    now = [0.0]
    monkeypatch.setattr(epochs, "Pace", partial(Pace, clock=lambda: now[0]))
    runner = build_runner(load_config(write_run(valid_splits=[], save_every_n_iters=1, log_freq=1)))
    monkeypatch.setattr(runner, "_save_checkpoint", lambda epoch: now.append(now.pop() + 100))
    runner.train_epoch(0)
    timing = [json.loads(line) for line in (runs()[0] / "timing.txt").read_text().splitlines()]
    assert now[0] == 600 and {line["data_wait_share"] for line in timing} == {0.0}


def test_tensorboard_draws_both_logs(write_run, runs):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(write_run(max_epoch=1, tensorboard=True))
    events = EventAccumulator(str(runs()[0] / "tensorboard")).Reload()
    drawn = events.Tags()["scalars"]
    assert {"train_loss", "train_lr", "train_grad_norm", "samples_per_second", "val_agg_metrics"} <= set(drawn)
    assert events.Scalars("train_loss")[0].step == 7


@pytest.mark.slow
def test_weights_and_biases_gets_the_same(write_run, runs, monkeypatch, tmp_path):
    """A stand-in for its client, which needs an account: what is called, and with what."""
    (tmp_path / "wandb.py").write_text(
        "calls = []\n"
        "class Run:\n"
        "    id = 'abc'\n"
        "    def log(self, numbers, step): calls.append((numbers, step))\n"
        "    def finish(self): calls.append('finished')\n"
        "def init(**arguments): calls.append(arguments); return Run()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = write_run(max_epoch=1, valid_splits=[], resume_ckpt_path="auto", wandb={"project": "mine"})
    train(path, ["run.wandb.dir=here", "run.wandb.resume=must", "run.wandb.config.lab=ours"])
    import wandb

    arguments, *logged, last = wandb.calls
    assert (arguments["project"], arguments["dir"], arguments["resume"]) == ("mine", "here", "must")
    assert type(arguments["config"]) is dict and arguments["config"] == {"lab": "ours"}
    assert last == "finished" and any("train_loss" in numbers and step == 7 for numbers, step in logged)
    wandb.calls.clear()
    train(path, ["run.max_epoch=2"])
    assert wandb.calls[0]["id"] == "abc"  # the same curve goes on
    assert wandb.calls[0]["resume"] == "allow" and wandb.calls[0]["config"]["run"]["max_epoch"] == 2


def test_every_wrong_key_is_told(write_run, monkeypatch):
    monkeypatch.setattr("lavis_kvmod.runners.settings.is_installed", lambda name: False)
    wrong = {
        "save_every_n_iters": 0,
        "keep_last": 0,
        "max_bad_steps": -1,
        "patience": "never",
        "max_grad_norm": 0,
        "kv_lr_scale": "fast",
        "lr_layer_decay": 2,
        "deterministic": 1,
        "dist_timeout": -1,
        "tensorboard": True,
        "wandb": True,
    }
    with pytest.raises(ConfigurationError) as caught:
        load_config(write_run(**wrong))
    text = "\n".join(caught.value.problems)
    for key in wrong:
        assert f"run.{key}: " in text
    assert "run.keep_last: expected a whole number above 0, got 0" in text
    assert "run.wandb: wandb is not installed; pip install wandb, or set run.wandb=false" in text
    assert len(caught.value.problems) == len(wrong)
    assert not run_log.is_installed("no_such_package_at_all")
