"""The table, `metrics.json` and the page."""

import json
from types import SimpleNamespace

import torch
from PIL import Image
from skimage import data

from lavis_kvmod.reports.evaluation import Report, text_table, write
from lavis_kvmod.tasks.evaluation import Evaluated

ABOUT = {
    "run_file": "run.yaml",
    "options": ["run.seed=1"],
    "model": {"arch": "blip2_opt_kvmod", "model_type": "demo", "checkpoint": None},
    "task": "kvmod_vqa",
    "data": {"custom_vqa": "default"},
    "versions": {"python": "3.11", "pycocoevalcap": None},
}


def report(tmp_path, **row):
    Image.fromarray(data.chelsea()).save(tmp_path / "cat.jpg")
    rows = [
        {
            "instance_id": "0",
            "image": "cat.jpg",
            "question": "what | is it?",
            "answers": ["cat", "cat", "kitten"],
            "prediction": "<b>cat</b>",
            "accuracy": 0.0,
            "confidence": 0.25,
            **row,
        }
    ]
    evaluated = Evaluated(rows, SimpleNamespace(vis_root=str(tmp_path)), {}, ("accuracy",))
    metrics = {"overall": 12.5, "agg_metrics": 12.5, "scored": 1, "loss": float("nan")}
    return Report({"val": metrics, "a/b": {}}, {"val": evaluated}, ABOUT)


def test_table_has_a_column_for_each_split():
    table = text_table(
        {"val": {"CIDEr": 1.25, "scored": 3}, "test": {"CIDEr": 12.0, "tokeniser": "ptb", "left_out": "SPICE: no"}}
    )
    assert [line.split() for line in table.splitlines()] == [
        ["val", "test"],
        ["CIDEr", "1.2500", "12.00"],
        ["scored", "3"],
        ["tokeniser", "ptb"],
    ]
    assert len({len(line) for line in table.splitlines()}) == 1


def test_files(tmp_path):
    folder = tmp_path / "run"
    paths = write(report(tmp_path), folder)
    assert paths == [folder / "metrics.json", folder / "report.md"]
    found = json.loads(paths[0].read_text())
    assert found["val"] == {"overall": 12.5, "agg_metrics": 12.5, "scored": 1, "loss": None}
    assert found["provenance"] == {**ABOUT, "samples": {"val": 1}}
    page = paths[1].read_text(encoding="utf-8")
    cells = ["![cat.jpg](report/val_01.jpg)", r"what \| is it?", "cat ×2<br>kitten", "&lt;b&gt;cat&lt;/b&gt;"]
    assert (
        page.count(" | ".join([*cells, "0.0000", "0.2500"])) == 3
    )  # of one row, the worst, the best and the one between
    assert "1 predictions; scored: 1." in page and "## a/b" in page and "| overall | 12.50 |" in page
    assert [path.name for path in (folder / "report").iterdir()] == ["val_01.jpg"]
    with Image.open(folder / "report/val_01.jpg") as image:
        assert max(image.size) == 256


def test_equal_runs_give_equal_files(tmp_path):
    for name in ("one", "two"):
        write(report(tmp_path), tmp_path / name)
    for path in (tmp_path / "one").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


def test_a_failure_leaves_the_old_page(tmp_path):
    write(report(tmp_path), tmp_path / "run")
    before = (tmp_path / "run/report.md").read_bytes()
    broken = report(tmp_path, prediction="\ud800")
    try:
        write(broken, tmp_path / "run")
    except UnicodeEncodeError:
        pass
    assert (tmp_path / "run/report.md").read_bytes() == before
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"metrics.json", "report", "report.md"}


def test_captions_say_how_they_were_split(tmp_path):
    base = report(tmp_path)
    captions = base._replace(metrics={"val": {"CIDEr": 1.0, "tokeniser": "simple", "left_out": "SPICE: no java"}})
    write(captions, tmp_path / "run")
    page = (tmp_path / "run/report.md").read_text(encoding="utf-8")
    assert "simple tokeniser, since Java was not there" in page
    assert "Left out: SPICE: no java." in page and "| left_out |" not in page


def test_examples_of_streamed_data_are_those_whose_pictures_were_kept(tmp_path):
    base = report(tmp_path)
    rows = [{**base.evaluated["val"].rows[0], "instance_id": str(i), "image": f"shard/{i}"} for i in range(9)]
    evaluated = Evaluated(rows, SimpleNamespace(), {str(i): torch.zeros(3, 8, 8) for i in (3, 7)}, ("accuracy",))
    write(base._replace(evaluated={"val": evaluated}), tmp_path / "run")
    page = (tmp_path / "run/report.md").read_text(encoding="utf-8")
    assert "the examples are from the first 2 samples" in page
    assert "shard/3" in page and "shard/7" in page and "shard/0" not in page
    assert {path.name for path in (tmp_path / "run/report").iterdir()} == {"val_01.jpg", "val_02.jpg"}
