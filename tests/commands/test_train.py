"""Whole runs by `lavis.train`'s code path: LAVIS's data set classes and files in their layouts, small real models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from lavis_kvmod.commands.evaluate import evaluate
from lavis_kvmod.commands.launch import build_runner, load_config
from lavis_kvmod.commands.train import train
from lavis_kvmod.system.schema import ConfigurationError
from lavis_kvmod.weights import files as checkpoints

COLOURS = {"red": (200, 30, 30), "blue": (30, 30, 200), "green": (20, 150, 40)}
PROMPT = "Question: {} Short answer:"


def write_images(folder: Path, names):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        colour = list(COLOURS.values())[i % 3]
        Image.new("RGB", (40 + i, 32), colour).save(folder / name)


@pytest.fixture()
def vqa_files(tmp_path):
    """VQAv2 as LAVIS lays it out: train.json, and for val also the official question and annotation files."""
    root = tmp_path / "vqa"
    names = [f"{i:04}.png" for i in range(7)]
    write_images(root / "images", names)

    def rows(chosen, first_id):
        return [
            {
                "image": name,
                "question": "what colour is it?",
                "question_id": first_id + i,
                "answer": [list(COLOURS)[names.index(name) % 3]] * 9 + ["purple"],
                "dataset": "vqa",
            }
            for i, name in enumerate(chosen)
        ]

    val = rows(names[4:], 100)
    (root / "train.json").write_text(json.dumps(rows(names[:4] * 2, 1)))
    (root / "val.json").write_text(json.dumps(val))
    (root / "answers.json").write_text(json.dumps(list(COLOURS)))
    questions = [{"image_id": i, "question": r["question"], "question_id": r["question_id"]} for i, r in enumerate(val)]
    annotations = [
        {
            "image_id": i,
            "question_id": r["question_id"],
            "question_type": "what colour",
            "answer_type": "other",
            "multiple_choice_answer": r["answer"][0],
            "answers": [{"answer": a, "answer_id": k, "answer_confidence": "yes"} for k, a in enumerate(r["answer"])],
        }
        for i, r in enumerate(val)
    ]
    official = {"data_type": "", "data_subtype": "", "info": {}, "license": {}, "task_type": ""}
    (root / "questions.json").write_text(json.dumps({**official, "questions": questions}))
    (root / "annotations.json").write_text(json.dumps({**official, "annotations": annotations}))
    return root


@pytest.fixture()
def run_file(tmp_path, vqa_files, model_config, monkeypatch):
    """A function: the path of a run file on those data, with overrides of its run and model sections."""
    monkeypatch.chdir(tmp_path)
    files = [str(vqa_files / f"{n}.json") for n in ("val", "answers", "questions", "annotations")]
    processors = {
        "vis_processor": {k: {"name": "blip_image_eval", "image_size": 28} for k in ("train", "eval")},
        "text_processor": {k: {"name": "blip_question"} for k in ("train", "eval")},
    }
    train_file = str(vqa_files / "train.json")

    def write(model=(), **run):
        cfg = {
            "model": {**model_config(**dict(model)), "model_type": "pretrain_opt2.7b"},
            "datasets": {
                "coco_vqa": {
                    **processors,
                    "build_info": {
                        "annotations": {
                            "train": {"url": [train_file], "storage": [train_file]},
                            "val": {"url": files, "storage": files},
                            "test": {"url": files[:2], "storage": files[:2]},
                        },
                        "images": {"storage": str(vqa_files / "images")},
                    },
                }
            },
            "run": {
                "task": "kvmod_vqa",
                "prompt": PROMPT,
                "device": "cpu",
                "max_epoch": 2,
                "init_lr": 1e-3,
                "batch_size_train": 3,
                "batch_size_eval": 2,
                "num_workers": 0,
                "num_beams": 1,
                "max_len": 3,
                "output_dir": "output/here",
                "valid_splits": ["val"],
                "test_splits": ["val"],
                **run,
            },
        }
        path = tmp_path / "run.yaml"
        OmegaConf.save(OmegaConf.create(cfg), path)
        return str(path)

    return write


def only_run(tmp_path) -> Path:
    (folder,) = (tmp_path / "output/here").iterdir()
    return folder


@pytest.mark.slow
def test_a_run_writes_where_the_user_stands(run_file, tmp_path):
    logs = train(run_file())
    folder = only_run(tmp_path)
    assert {p.name for p in folder.iterdir() if p.name != "tensorboard"} == {
        ".lock",
        "checkpoint_best.pth",
        "checkpoint_last-1.pth",
        "checkpoint_last.pth",
        "config.yaml",
        "environment.json",
        "log.txt",
        "parts.json",
        "report",
        "report.html",
        "result",
        "timing.txt",
    }
    assert 0 <= logs["val"]["agg_metrics"] <= 100
    rows = json.loads((folder / "result" / "val_epochbest.json").read_text())
    assert [r["question_id"] for r in rows] == [100, 101, 102]
    text = (folder / "log.txt").read_text()
    lines = [json.loads(line) for line in text[text.index("\n}\n") + 3 :].splitlines()]
    assert [line["train_epoch"] for line in lines if "train_epoch" in line] == [0, 1]
    last = checkpoints.read(folder / "checkpoint_last.pth")
    assert last["epoch"] == 1 and last["config"]["run"]["prompt"] == PROMPT
    assert {k.split(".")[0] for k in last["model"]} == {"kv_prefix", "Qformer", "query_tokens", "opt_proj"}


def test_lavis_own_task_and_evaluation_run_on_the_cpu(run_file, tmp_path):
    """`task: vqa`, the official evaluation, and our model: the drop-in."""
    from lavis.common.vqa_tools.vqa import VQA
    from lavis.common.vqa_tools.vqa_eval import VQAEval

    logs = train(run_file(task="vqa", inference_method="generate", max_epoch=1))
    result = only_run(tmp_path) / "result" / "val_vqa_result.json"
    official = VQA(str(tmp_path / "vqa/annotations.json"), str(tmp_path / "vqa/questions.json"))
    scorer = VQAEval(official, official.loadRes(str(result), str(tmp_path / "vqa/questions.json")), n=2)
    scorer.evaluate()
    assert logs["val"]["agg_metrics"] == scorer.accuracy["overall"]


@pytest.mark.slow
def test_both_tasks_agree_on_the_score(run_file, tmp_path):
    path = run_file(max_epoch=1)
    checkpoint = train(path) and only_run(tmp_path) / "checkpoint_last.pth"
    options = ["model.load_finetuned=true", f"model.finetuned={checkpoint}"]
    ours = evaluate(path, options)
    theirs = evaluate(path, [*options, "run.task=vqa", "run.inference_method=generate"])
    assert ours["val"]["agg_metrics"] == pytest.approx(theirs["val"]["agg_metrics"], abs=0.01)


def test_evaluate_takes_the_validation_splits_where_there_are_no_others(run_file, capsys):
    assert list(evaluate(run_file(test_splits=[]))) == ["val"]
    assert "agg_metrics" in capsys.readouterr().out
    with pytest.raises(ConfigurationError, match="nothing to evaluate"):
        evaluate(run_file(test_splits=[], valid_splits=[]))


def test_lavis_own_training_loop_and_captioning_task_take_the_model(run_file, build, images):
    """The calls that `runner_base`, `vqa` and `captioning` make."""
    from lavis.tasks.base_task import BaseTask
    from lavis.tasks.captioning import CaptionTask

    runner = build_runner(load_config(run_file(valid_splits=[])))
    runner.model.train()
    stats = BaseTask().train_epoch(
        epoch=0,
        model=runner.model,
        data_loader=runner.train_loader,
        optimizer=runner.optimizer,
        lr_scheduler=runner.lr_scheduler,
        scaler=None,
        cuda_enabled=False,
    )
    assert float(stats["loss"]) > 0
    task = CaptionTask(num_beams=2, max_len=5, min_len=1, evaluate=True)
    rows = task.valid_step(build().eval(), {"image": images(2), "image_id": ["3", "4"]})
    assert [row["image_id"] for row in rows] == [3, 4]


def test_more_batch_than_data(run_file):
    """LAVIS drops the only batch and divides by zero."""
    assert train(run_file(batch_size_train=64, max_epoch=1)) is not None


@pytest.mark.slow
def test_best_may_be_zero_or_less(run_file, tmp_path, monkeypatch):
    from lavis_kvmod.tasks.vqa import KVModVQATask

    values = iter([-5.0, -2.0, -3.0])
    monkeypatch.setattr(KVModVQATask, "after_evaluation", lambda self, **kw: {"agg_metrics": next(values, 0.0)})
    train(run_file(max_epoch=3))
    best = checkpoints.read(only_run(tmp_path) / "checkpoint_best.pth")
    assert (best["epoch"], best["best_agg_metric"]) == (1, -2.0)


@pytest.mark.slow
def test_where_nothing_is_scored_the_newest_is_the_best(run_file, tmp_path, monkeypatch):
    from lavis_kvmod.tasks.vqa import KVModVQATask

    monkeypatch.setattr(KVModVQATask, "after_evaluation", lambda self, **kw: {"agg_metrics": 0.0, "scored": 0})
    train(run_file(max_epoch=2))
    assert checkpoints.read(only_run(tmp_path) / "checkpoint_best.pth")["epoch"] == 1


@pytest.mark.slow
def test_without_validation_the_newest_is_the_best(run_file, tmp_path):
    assert train(run_file(valid_splits=[])) is not None
    assert checkpoints.read(only_run(tmp_path) / "checkpoint_best.pth")["epoch"] == 1


def test_test_split_is_scored_with_the_best_weights(run_file, tmp_path, monkeypatch):
    from lavis_kvmod.tasks.vqa import KVModVQATask

    values = iter([3.0, 1.0])
    seen = []

    def after(self, val_result, split_name, epoch=None, **kwargs):
        return {"agg_metrics": next(values, 0.0)}

    def before(self, model, dataset, **kwargs):
        seen.append(model.query_tokens.detach().clone())
        self._dataset = dataset

    monkeypatch.setattr(KVModVQATask, "after_evaluation", after)
    monkeypatch.setattr(KVModVQATask, "before_evaluation", before)
    train(run_file())
    first, second, test = seen
    assert not torch.equal(first, second) and torch.equal(test, first)


def test_resume_goes_on_from_the_epoch_and_keeps_the_best(run_file, tmp_path):
    path = run_file(max_epoch=1)
    train(path)
    last = only_run(tmp_path) / "checkpoint_last.pth"
    saved = checkpoints.read(last)
    runner = build_runner(load_config(path, [f"run.resume_ckpt_path={last}", "run.max_epoch=2"]))
    runner._load_checkpoint(str(last))
    assert (runner.state.epoch, runner.state.best_agg_metric) == (1, saved["best_agg_metric"])
    for name, value in saved["model"].items():
        assert torch.equal(runner.model.state_dict()[name], value)
    steps = {int(s["step"]) for s in runner.optimizer.state_dict()["state"].values()}
    assert steps == {3}  # 8 samples in batches of 3


def test_accumulated_gradients_are_averaged_and_flushed(run_file, monkeypatch):
    """8 samples: 4 batches of 2 in one group are one batch of 8; groups of 3 leave one batch, which also steps."""
    from lavis_kvmod import Blip2OPTKVMod

    def mean_over_samples(self, samples):  # so that equal batches weigh equally
        return {"loss": self.encode(samples).soft_prompt.pow(2).mean()}

    monkeypatch.setattr(Blip2OPTKVMod, "forward", mean_over_samples)

    def gradients(**run):
        runner = build_runner(load_config(run_file(max_epoch=1, valid_splits=[], **run)))
        runner.model.eval()
        runner.model.train = lambda mode=True: runner.model  # no dropout: it would differ
        taken, step = [], runner.optimizer.step

        def record():
            taken.append(runner.model.opt_proj.weight.grad.clone())
            step()

        runner.optimizer.step = record
        runner.train_epoch(0)
        return taken

    (whole,) = gradients(batch_size_train=8)
    (accumulated,) = gradients(batch_size_train=2, accum_grad_iters=4)
    assert (whole - accumulated).norm() <= 1e-4 * whole.norm()
    first, left_over = gradients(batch_size_train=2, accum_grad_iters=3)
    assert left_over.norm() > 0 and not torch.allclose(first, whole, rtol=1e-2)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(run_file, monkeypatch, tmp_path):
    from lavis_kvmod import Blip2OPTKVMod

    forward, calls = Blip2OPTKVMod.forward, []

    def broken(self, samples):
        calls.extend([1] * self.training)
        bad = self.training and len(calls) == 5
        return {"loss": forward(self, samples)["loss"] * (float("nan") if bad else 1)}

    monkeypatch.setattr(Blip2OPTKVMod, "forward", broken)
    with pytest.raises(FloatingPointError, match=r"the loss is nan \(image_key.*\) in epoch 1, batch 1;"):
        train(run_file(max_bad_steps=0))
    assert checkpoints.read(only_run(tmp_path) / "checkpoint_last.pth")["epoch"] == 0


def test_what_comes_from_the_environment_is_written_nowhere(run_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TOKEN", "hf_secret")
    train(run_file(max_epoch=1, prompt="${oc.env:TOKEN} {}"))
    written = (".yaml", ".txt", ".pth", ".json", ".html")
    files = [path for path in only_run(tmp_path).rglob("*") if path.suffix in written]
    assert len(files) >= 5 and "oc.env:TOKEN" in (only_run(tmp_path) / "config.yaml").read_text()
    for path in files:
        assert b"hf_secret" not in path.read_bytes(), path
    screen = capsys.readouterr().err
    assert "oc.env:TOKEN" in screen and "hf_secret" not in screen


@pytest.mark.slow
def test_bf16_autocast_on_the_cpu(run_file):
    runner = build_runner(load_config(run_file(amp="bf16", max_epoch=1)))
    assert runner.scaler is None
    runner.train()
    trained = {p.dtype for p in runner.model.parameters() if p.requires_grad}
    assert trained == {torch.float32}


def test_half_precision_towers_run_on_the_cpu(run_file):
    """LAVIS's default precisions are for CUDA; on the CPU they are stored in float32, as load_model does."""
    assert train(run_file(model={"vit_precision": "fp16", "opt_precision": "fp16"}, max_epoch=1)) is not None


@pytest.mark.slow  # tests/runners/test_processes.py does the like with processes that need not import LAVIS again
def test_two_processes_train_and_count_every_sample_once(run_file, tmp_path):
    path = run_file(max_epoch=1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, "-m", "lavis.train", "--cfg-path", path],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    folder = only_run(tmp_path)  # one folder for both ranks
    rows = json.loads((folder / "result" / "val_epochbest.json").read_text())
    assert sorted(r["question_id"] for r in rows) == [100, 101, 102]  # 3 samples on 2 ranks
    assert checkpoints.read(folder / "checkpoint_last.pth")["epoch"] == 0
