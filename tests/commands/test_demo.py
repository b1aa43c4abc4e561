"""The demo's promises. The whole of it takes minutes, so it is marked slow; its page is checked in an instant."""

import json
import subprocess
import sys

import numpy as np
import pytest

from lavis_kvmod.commands.demo import accuracy_table, answer_lines, contact_sheet, trainings_at_once
from lavis_kvmod.demo import digits
from lavis_kvmod.weights import files as checkpoints

WITH_PREFIX = {"digit": 0.90, "ink": 0.95, "paper": 0.88, "even": 0.95}
AT_MOST_WITHOUT = {"ink": 0.27, "paper": 0.35}


def predictions(wrong=()):
    return [
        {"question_id": f"{scan.index:04}-{q.type}", "answer": "nothing" if q.type in wrong else q.answer}
        for scan in digits.load_scans("test")
        for q in digits.questions(scan)
    ]


def test_contact_sheet_shows_wrong_answers_in_red():
    def red_pixels(rows, without):
        pixels = np.asarray(contact_sheet(rows, without)).reshape(-1, 3)
        return (pixels == (178, 34, 34)).all(1).sum()

    assert red_pixels(predictions(), predictions()) == 0
    one, both = red_pixels(predictions(), predictions(wrong=["ink"])), red_pixels(*[predictions(wrong=["ink"])] * 2)
    assert both == 2 * one > 100  # the two models side by side


def test_answers_and_table_say_what_was_measured():
    first = digits.load_scans("test")[0]
    lines = answer_lines(predictions(wrong=["paper"]), scans=1)
    assert lines.splitlines()[0].strip() == digits.caption(first)
    assert f"nothing  wrong, it is {first.paper}" in lines and lines.count("right") == 3
    scores = {"digit": 0.5, "ink": 0.25, "paper": 0.75, "even": 1.0, "overall": 0.625}
    table = accuracy_table({"with_prefix": scores, "without_prefix": {k: v / 2 for k, v in scores.items()}})
    assert [line.split()[-2:] for line in table.splitlines()[1:]][1] == ["0.125", "0.250"]


def test_both_are_trained_at_once_where_there_is_room():
    gib = 2**30
    cases = {(1, None): 1, (1, 64 * gib): 1, (2, None): 2, (2, 4 * gib): 2, (2, 3 * gib): 1, (64, 64 * gib): 2}
    assert {case: trainings_at_once(*case) for case in cases} == cases


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_colour_comes_through_the_prefix_alone(tmp_path):
    """`lavis-kvmod demo`, as `make demo` runs it: with the prefix all four questions are answered; without it, from
    the same image and the same weights, the colour questions stay near chance."""
    subprocess.run([sys.executable, "-m", "lavis_kvmod", "demo"], cwd=tmp_path, check=True, timeout=1700)
    output = tmp_path / "output" / "demo"
    summary = json.loads((output / "summary.json").read_text())
    for kind, least in WITH_PREFIX.items():
        assert summary["with_prefix"][kind] >= least, kind
    for kind, most in AT_MOST_WITHOUT.items():
        assert summary["without_prefix"][kind] <= most, kind
    assert summary["without_prefix"]["digit"] >= 0.75
    assert summary["peak_memory_gib"] < 4
    assert (output / "answers.png").stat().st_size > 10_000
    assert "model.kv_modulation" in (output / "report.html").read_text(encoding="utf-8")

    # what it trained loads in one line, in another process than the one that wrote it
    (best,) = output.glob("with_prefix/*/checkpoint_best.pth")
    from lavis.models import load_model_and_preprocess

    model, vis, text = load_model_and_preprocess("blip2_opt_kvmod", "demo", is_eval=True)
    model.load_checkpoint(str(best))
    scans = digits.load_scans("test")[:20]
    import torch

    image = torch.stack([vis["eval"](digits.render(scan)) for scan in scans])
    questions = [text["eval"](digits.QUESTIONS["ink"])] * len(scans)
    answers = model.predict_answers(
        {"image": image, "text_input": questions}, prompt="Question: {} Short answer:", num_beams=1, max_len=5
    )
    assert sum(a == s.ink for a, s in zip(answers, scans)) >= 18


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_lines_printed_at_its_end_load_what_was_trained(tmp_path):
    command = [sys.executable, "-m", "lavis_kvmod", "demo", "--output-dir", "it's here", "--options"]
    command += ["run.max_epoch=1", "run.valid_splits=[]"]
    done = subprocess.run(command, cwd=tmp_path, check=True, timeout=800, stdout=subprocess.PIPE, text=True)
    lines = done.stdout[done.stdout.index("from lavis.models import") :]
    loaded = {}
    exec(lines, loaded)
    (best,) = (tmp_path / "it's here").glob("with_prefix/*/checkpoint_best.pth")
    saved, state = checkpoints.read(best)["model"], loaded["model"].state_dict()
    assert not loaded["model"].training and len(saved) > 50
    assert all(np.array_equal(state[name], value) for name, value in saved.items())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_captions(tmp_path):
    command = [sys.executable, "-m", "lavis.train", "--cfg-path", "projects/kvmod/demo_caption.yaml"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=850)
    (folder,) = (tmp_path / "output" / "demo_caption").iterdir()
    tests = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines() if "test_" in line[:8]]
    assert tests[-1]["test_exact_match"] >= 85
    assert checkpoints.read(folder / "checkpoint_best.pth")["epoch"] >= 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_processes_train_it(tmp_path):
    """As docs/several_gpus.md says, but one epoch; each answer of each split counts once."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "lavis.train"]
    command += ["--cfg-path", "projects/kvmod/demo_vqa.yaml", "--options", "run.max_epoch=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "output" / "demo_vqa").iterdir()
    saved = [checkpoints.read(folder / f"checkpoint_{name}.pth") for name in ("best", "last")]
    assert [(of["epoch"], len(of["rng"])) for of in saved] == [(0, 2), (0, 2)]
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines() if line.startswith('{"')]
    facts = {name: value for line in lines for name, value in line.items()}
    assert facts["train_epoch"] == 0
    for split, name in (("val", "val_epoch0"), ("test", "test_epochbest")):
        expected = sorted(f"{scan.index:04}-{kind}" for scan in digits.load_scans(split) for kind in digits.QUESTIONS)
        rows = json.loads((folder / "result" / f"{name}.json").read_text())
        assert sorted(row["question_id"] for row in rows) == expected
        assert facts[f"{split}_scored"] == len(expected)
        assert facts[f"{split}_overall"] == pytest.approx(100 * np.mean([row["accuracy"] for row in rows]), abs=0.01)
