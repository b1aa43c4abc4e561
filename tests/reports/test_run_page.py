"""`report.html`: what it says of one run and of several, from their files alone."""

import json
import re
from types import SimpleNamespace

import pytest
from PIL import Image

from lavis_kvmod.commands import cli
from lavis_kvmod.models.parts import PartSummary
from lavis_kvmod.reports.charts import line_chart
from lavis_kvmod.reports.run_files import read_run
from lavis_kvmod.reports.run_page import calibration, leave_page
from lavis_kvmod.tasks.evaluation import Evaluated

CONFIG = """run:
  task: kvmod_vqa
  valid_splits: [val]
  test_splits: [val_hard]
model:
  kv_modulation: {kv}
  token: ${{oc.env:KVMOD_TOKEN}}
"""
PARTS = [PartSummary("kv_prefix", 4_723_200, True, "float32", 18_892_800)]


def rows(accuracies):
    return [
        {
            "instance_id": str(i),
            "question_id": i,
            "image": f"{i}.png",
            "question": "what <i>is</i> it?",
            "answers": ["cat", "cat", "kitten"],
            "prediction": "<script>alert(1)</script>" if i == 0 else "cat",
            "accuracy": accuracy,
            "confidence": 0.75,
        }
        for i, accuracy in enumerate(accuracies)
    ]


@pytest.fixture()
def make_run(tmp_path):
    """A function: the folder of a run as the runner leaves it, and what is at hand when it is over."""

    def make(name="one", accuracies=(0.0, 1.0), kv="true"):
        folder = tmp_path / name
        (folder / "result").mkdir(parents=True)
        lines = [{"run": {"task": "kvmod_vqa"}}]
        for epoch in range(2):
            lines.append({"train_epoch": epoch, "train_loss": f"{1 / (1 + epoch)}", "train_lr": "1e-3"})
            lines.append(
                {"val_overall": 50.0 + epoch, "val_question_type/ink": 25.0, "val_loss": 2.0, "val_epoch": epoch}
            )
        lines.append({"val_hard_overall": 12.5, "val_hard_loss": None})
        text = json.dumps(lines[0], indent=4) + "\n" + "\n".join(map(json.dumps, lines[1:]))
        (folder / "log.txt").write_text(text + '\n{"train_epoch": 2, "train_lo')  # killed while it wrote
        (folder / "config.yaml").write_text(CONFIG.format(kv=kv))
        about = {"command": "train --options model.token=s3cret", "versions": {"torch": "2.9"}, "device": "cpu"}
        (folder / "environment.json").write_text(json.dumps({"number": 1, "starts": [{**about, "processes": 1}]}))
        found = rows(accuracies)
        (folder / "result/val_epoch1.json").write_text(json.dumps(found))
        (folder / "result/val_hard_epochbest.json").write_text(json.dumps(found))
        for i in range(len(found)):
            Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(folder / f"{i}.png")
        dataset = SimpleNamespace(vis_root=str(folder))
        return folder, {"val_hard": Evaluated(found, dataset, {}, ("accuracy",))}, {"val": dataset}

    return make


def test_a_run_on_one_page(make_run, monkeypatch):
    monkeypatch.setenv("KVMOD_TOKEN", "s3cret")
    folder, evaluated, datasets = make_run()
    assert leave_page(folder, PARTS, evaluated, datasets) == folder / "report.html"
    page = (folder / "report.html").read_text(encoding="utf-8")
    for text in ("question_type/ink", "51", "val_hard", "12.5", "4,723,200", "torch 2.9", "learning rate", "cat ×2"):
        assert text in page, text
    assert page.count('<img src="data:image/jpeg;base64,') == 6  # two rows: worst, best, between
    assert "&lt;script&gt;alert(1)" in page and "<script" not in page and "<i>is" not in page
    assert "s3cret" not in page and "${oc.env:KVMOD_TOKEN}" in page
    assert not re.search(r"https?:|url\(|@import|<link", page)  # nothing is fetched
    assert "expected calibration error 0.25" in page

    again = page
    (folder / "report.html").unlink()
    assert cli.main(["report", str(folder)]) == 0
    assert (folder / "report.html").read_text(encoding="utf-8") == again


def test_runs_beside_each_other(make_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, accuracies, kv in (("with", (0.0, 1.0), "true"), ("without", (0.0, 0.0), "false")):
        folder, evaluated, datasets = make_run(name, accuracies, kv)
        leave_page(folder, PARTS, evaluated, datasets)
    assert cli.main(["report", "with", "without"]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<td>model.kv_modulation</td><td>True</td><td>False</td>" in page
    (differ,) = re.findall(r"<td>what &lt;i&gt;is&lt;/i&gt; it\?</td>", page)  # the second question alone
    assert 'class="right">cat<' in page and 'class="wrong">cat ✗<' in page
    assert cli.main(["report", "with", "nowhere"]) == 2
    assert "nowhere: expected the folder of a run, with its log.txt" in capsys.readouterr().err


def test_what_goes_wrong_ends_no_run(make_run, caplog):
    folder, evaluated, datasets = make_run()
    (folder / "report.html").mkdir()  # cannot be written
    assert leave_page(folder, PARTS, evaluated, datasets) is None
    assert f"{folder} has no report.html" in caplog.text
    (folder / "result/val_epoch1.json").write_text("[{")
    (folder / "environment.json").write_text("[]")
    assert list(read_run(folder).predictions) == ["val_hard"]


def test_split_names_that_begin_alike(make_run):
    run = read_run(make_run()[0])
    assert run.curve("val", "overall") == [(0, 50.0), (1, 51.0)] and run.metrics("val_hard") == {"overall": 12.5}
    assert run.curve("train", "loss") == [(0, 1.0), (1, 0.5)]


def test_calibration():
    sure = [{"confidence": 0.95, "accuracy": a} for a in (1.0, 1.0, 0.0, 1.0)]
    unsure = [{"confidence": 0.25, "accuracy": 0.25}]
    found = calibration([*sure, *unsure, {"prediction": "no figures"}])
    assert found.bins == [(0.25, 0.25, 1), (pytest.approx(0.95), 0.75, 4)]
    assert found.error == pytest.approx(0.2 * 4 / 5)
    assert calibration([{"prediction": "cat"}]) is None


def test_charts_take_any_numbers():
    assert line_chart("nothing", {"a": [(0, float("nan"))]}) == ""
    one = line_chart("a < b", {"a & b": [(1, 2.0)], "gone": []})
    assert "a &lt; b" in one and "a &amp; b" in one and "gone" not in one and "nan" not in one
