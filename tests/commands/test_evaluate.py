"""`python -m lavis.evaluate` on the demo's data: the table, the files, and two processes."""

import json
import subprocess
import sys

import pytest
import torch

from lavis_kvmod.commands.evaluate import evaluate
from lavis_kvmod.weights import files as checkpoints

SMALL = ["run.device=cpu", "run.batch_size_eval=100", "run.num_beams=1", "run.max_len=3", "run.num_workers=0"]


@pytest.fixture()
def options(model_config, build, tmp_path, monkeypatch):
    """Options that put the small model, from a checkpoint of its own, in place of the demo's."""
    monkeypatch.chdir(tmp_path)
    checkpoints.save({"model": checkpoints.trained_state_dict(build())}, tmp_path / "tuned.pth")
    chosen = [*SMALL, f"run.output_dir={tmp_path / 'output'}"]
    for key, value in model_config(finetuned=str(tmp_path / "tuned.pth"), load_finetuned=True).items():
        if key == "arch":
            continue
        if key.endswith("geometry"):
            chosen += [f"model.{key}.{name}={size}" for name, size in value.items()]
        else:
            chosen.append(f"model.{key}={value}")
    return chosen


def of_data(name):
    return [f"datasets.{name}.vis_processor.{stage}.image_size=28" for stage in ("train", "eval")]


def only_run(tmp_path):
    (folder,) = (tmp_path / "output").iterdir()
    return folder


def test_vqa(options, tmp_path, capsys):
    options += [*of_data("digits_vqa"), "run.test_splits=[val]"]
    logs = evaluate("projects/kvmod/demo_vqa.yaml", options)
    folder = only_run(tmp_path)
    printed = capsys.readouterr().out
    for name in ("overall", "exact_match", "agg_metrics", "scored", "loss", "question_type/ink"):
        assert name in printed and name in logs["val"]
    assert str(folder / "metrics.json") in printed and str(folder / "report.md") in printed
    found = json.loads((folder / "metrics.json").read_text())
    assert found["val"] == logs["val"] and found["provenance"]["samples"] == {"val": 576}
    about = found["provenance"]
    assert about["run_file"] == "projects/kvmod/demo_vqa.yaml" and about["options"] == options
    assert about["model"]["checkpoint"] == str(tmp_path / "tuned.pth")
    assert about["versions"]["torch"] and about["data"] == {"digits_vqa": "default"}
    page = (folder / "report.md").read_text(encoding="utf-8")
    pictures = sorted((folder / "report").glob("*.jpg"))
    assert "Which digit is written?" in page or "What colour" in page or "even?" in page
    assert pictures and all(f"(report/{path.name})" in page for path in pictures)
    assert (folder / "result/val_epochbest.csv").is_file()
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count('<img src="data:image/jpeg;base64,') == 12 and "question_type/ink" in page


def test_captions_without_java(options, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    options += [
        *of_data("digits_caption"),
        "run.test_splits=[val]",
        "run.caption_metrics=[Bleu,METEOR,CIDEr]",
    ]
    logs = evaluate("projects/kvmod/demo_caption.yaml", options)
    found = json.loads((only_run(tmp_path) / "metrics.json").read_text())
    assert found["val"]["tokeniser"] == logs["val"]["tokeniser"] == "simple" and "METEOR" not in found["val"]
    assert found["val"]["agg_metrics"] == found["val"]["CIDEr"] + found["val"]["Bleu_4"]
    assert "simple tokeniser" in (only_run(tmp_path) / "report.md").read_text(encoding="utf-8")


def test_the_checkpoint_that_is_named_is_evaluated(options, tmp_path, build, monkeypatch, capsys):
    """LAVIS passes over run.resume_ckpt_path in an evaluation, so that another model's figures were read as its."""
    model = build(seed=3)
    contents = {"model": checkpoints.trained_state_dict(model), "optimizer": {}, "epoch": 4}
    checkpoints.save(contents, tmp_path / "checkpoint_best.pth")
    seen = []
    monkeypatch.setattr(
        "lavis_kvmod.tasks.vqa.KVModVQATask.evaluation",
        lambda self, model, loader, **kwargs: seen.append(model.opt_proj.weight.detach().clone()),
    )
    options += [*of_data("digits_vqa"), "run.test_splits=[val]", f"run.resume_ckpt_path={tmp_path}/checkpoint_best.pth"]
    evaluate("projects/kvmod/demo_vqa.yaml", options)
    assert torch.equal(seen[0], model.opt_proj.weight)
    assert f"evaluating the weights of {tmp_path}/checkpoint_best.pth (run.resume_ckpt_path)" in capsys.readouterr().err
    found = json.loads((only_run(tmp_path) / "metrics.json").read_text())
    assert found["provenance"]["model"]["checkpoint"] == f"{tmp_path}/checkpoint_best.pth"


@pytest.mark.slow
def test_two_processes_say_what_one_does(options, tmp_path):
    options += [*of_data("digits_vqa"), "run.test_splits=[val]"]
    expected = evaluate("projects/kvmod/demo_vqa.yaml", options)["val"]
    rows = json.loads((only_run(tmp_path) / "result/val_epochbest.json").read_text())
    other = [option for option in options if not option.startswith("run.output_dir")]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "lavis.evaluate",
    ]
    command += ["--cfg-path", "projects/kvmod/demo_vqa.yaml", "--options", *other, f"run.output_dir={tmp_path / 'two'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "two").iterdir()
    found = json.loads((folder / "metrics.json").read_text())["val"]
    assert found == pytest.approx(expected, rel=1e-5)
    again = json.loads((folder / "result/val_epochbest.json").read_text())
    assert [row["prediction"] for row in again] == [row["prediction"] for row in rows] and len(again) == 576
    assert done.stdout.count("agg_metrics") == 1
