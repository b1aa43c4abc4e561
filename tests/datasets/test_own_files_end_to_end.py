"""From one's own files to a checkpoint and scores, by a user's commands; and docs/data.md, exactly as printed."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lavis_kvmod.commands.evaluate import evaluate
from lavis_kvmod.commands.pack import pack
from lavis_kvmod.commands.train import train
from lavis_kvmod.config.loading import load_config
from lavis_kvmod.datasets.bad_samples import BadDataError
from lavis_kvmod.demo import digits
from lavis_kvmod.system.schema import ConfigurationError
from lavis_kvmod.weights import files as checkpoints

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
ROWS = [
    {"image": "astronaut", "question": "Who is it?", "answer": "an astronaut", "question_type": "who"},
    {"image": "camera", "question": "Who is it?", "answer": "a man", "question_type": "who"},
    {"image": "chelsea", "question": "What is it?", "answer": "a cat", "question_type": "what"},
    {"image": "coffee", "question": "What is in the cup?", "answer": "coffee", "question_type": "what"},
    {"image": "rocket", "question": "What is it?", "answer": "a rocket", "question_type": "what"},
    {"image": "retina", "question": "What is it?", "answer": "an eye", "question_type": "what"},
]
CAPTIONS = [{"image": row["image"], "caption": [f"a photo of {row['answer']}", row["answer"]]} for row in ROWS]


def files(**by_split):
    return {"build_info": {"annotations": {split: {"storage": str(path)} for split, path in by_split.items()}}}


def predictions(tmp_path, split):
    (path,) = (path for path in tmp_path.glob(f"output/*/result/{split}*.json"))
    return json.loads(path.read_text())


def test_questions_from_a_csv_split_by_image(run_file, write_csv, tmp_path):
    section = {**files(train=write_csv("qa.csv", ROWS, ";")), "split": {"val": 0.2, "test": 0.2}}
    logs = train(run_file("custom_vqa", section, num_workers=2))
    assert 0 <= logs["test"]["agg_metrics"] <= 100
    (row,) = predictions(tmp_path, "test")
    assert row["question_id"].startswith("train-")
    (checkpoint,) = tmp_path.glob("output/*/checkpoint_best.pth")
    options = ["model.load_finetuned=true", f"model.finetuned={checkpoint}"]
    assert evaluate("run.yaml", options)["test"]["agg_metrics"] == logs["test"]["agg_metrics"]


def cut_two(photos):
    for name in ("chelsea.png", "more/coffee.png"):
        (photos / name).write_bytes((photos / name).read_bytes()[:3000])


def test_photographs_that_cannot_be_read_cost_no_run_and_are_counted(run_file, write_csv, tmp_path, photos):
    cut_two(photos)
    path = write_csv("qa.csv", ROWS)
    section = {**files(train=path, val=path, test=path), "on_bad_sample": "skip", "max_bad_share": 0.5}
    train(run_file("custom_vqa", section))
    (log,) = tmp_path.glob("output/*/log.txt")
    assert '"train_bad_samples": 2' in log.read_text()
    answered = [row["question_id"] for row in predictions(tmp_path, "test")]
    assert sorted(answered) == ["test-1", "test-2", "test-5", "test-6"]  # each good row once, the bad ones never


@pytest.mark.parametrize(
    "policy, message",
    [
        ({}, r"qa.csv, row [45]: .*(chelsea|coffee).png: not readable: .*set on_bad_sample: skip"),
        ({"on_bad_sample": "skip", "max_bad_share": 0.2}, r"2 (of 8 samples|samples in a row) could not be read"),
    ],
)
def test_they_stop_a_run_that_is_not_to_skip_them_or_not_so_many(
    run_file, write_csv, tmp_path, photos, policy, message
):
    cut_two(photos)
    path = run_file("custom_vqa", {**files(train=write_csv("qa.csv", ROWS)), **policy}, valid_splits=[], test_splits=[])
    with pytest.raises(BadDataError, match=message):
        train(path)


def test_what_is_wrong_with_the_data_is_told_beside_all_else(run_file, write_csv):
    train_file = write_csv("qa.csv", [{**row, "image": f"gone-{i}"} for i, row in enumerate(ROWS)])
    val_file = write_csv("val.csv", [{"picture": "a", "question": "b", "answer": "c"}])
    path = run_file("custom_vqa", files(train=train_file, val=val_file), test_splits=[], batch_size_train=0)
    with pytest.raises(ConfigurationError) as caught:
        load_config(path)
    text = str(caught.value)
    assert "run.batch_size_train: expected a whole number above 0" in text
    assert "datasets.custom_vqa: val.csv: expected a column 'image'" in text
    path = run_file("custom_vqa", files(train=train_file), valid_splits=[], test_splits=[])
    with pytest.raises(ConfigurationError, match=r"6 of 6 rows of train \(6 × image not found\)"):
        load_config(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["custom_vqa", "custom_caption", "artquest"])
def test_by_the_commands(run_file, write_csv, write_jsonl, tmp_path, name):
    path = write_jsonl("captions.jsonl", CAPTIONS) if "caption" in name else write_csv("qa.csv", ROWS)
    run_file(name, files(train=path, val=path, test=path))

    by_command("train", "run.max_epoch=2")
    (folder,) = (tmp_path / "output").iterdir()
    assert checkpoints.read(folder / "checkpoint_last.pth")["epoch"] == 1
    assert len(predictions(tmp_path, "test")) == 6
    assert "agg_metrics" in by_command(
        "evaluate", "model.load_finetuned=true", f"model.finetuned={folder}/checkpoint_best.pth"
    )


def by_command(command, *options):
    words = [sys.executable, "-m", f"lavis.{command}", "--cfg-path", "run.yaml"]
    done = subprocess.run(
        [*words, *(["--options", *options] if options else [])], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def by_function(command, *options):
    (train if command == "train" else evaluate)("run.yaml", list(options))


# ------------------------------------------------------------ handwriting, in each layout, to the report


@pytest.fixture()
def handwriting(tmp_path):
    """A function: the rows of questions or captions by split; the scans are PNG files below ``digits``, in a folder
    for each digit."""

    def write(kind):
        rows = {"train": [], "val": []}
        for split, scans in (("train", digits.load_scans("train")[:6]), ("val", digits.load_scans("val")[:5])):
            for scan in scans:
                path = tmp_path / "digits" / digits.DIGIT_WORDS[scan.digit] / f"{scan.index:04d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                digits.render(scan).save(path)
                name = {"image": path.relative_to(tmp_path / "digits").as_posix()}
                if kind == "caption":
                    rows[split].append({**name, "caption": digits.caption(scan)})
                for asked in digits.questions(scan) if kind == "vqa" else ():
                    rows[split].append(
                        {
                            **name,
                            "question": asked.question,
                            "answer": asked.answer,
                            "question_id": f"{scan.index}-{asked.type}",
                            "question_type": asked.type,
                        }
                    )
        return rows

    return write


def as_tsv(rows, split, tmp_path, write_csv):
    return write_csv(f"{split}.tsv", rows, "\t")


def as_json(rows, split, tmp_path, write_csv):
    """A list within an object, and a list of texts within each row."""
    nested = [{key: [value] if key in ("answer", "caption") else value for key, value in row.items()} for row in rows]
    path = tmp_path / f"{split}.json"
    path.write_text(json.dumps({"info": {"by": "hand"}, "annotations": nested}), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "command", [by_function, pytest.param(by_command, marks=pytest.mark.slow)], ids=["function", "command"]
)
@pytest.mark.parametrize(
    "kind, layout",
    [
        ("caption", "shards"),
        pytest.param("vqa", "tsv", marks=pytest.mark.slow),
        *(pytest.param(*both, marks=pytest.mark.slow) for both in (("vqa", "json"), ("vqa", "shards"))),
        *(pytest.param(*both, marks=pytest.mark.slow) for both in (("caption", "tsv"), ("caption", "json"))),
    ],
)
def test_handwriting_in_sub_folders_to_the_report(run_file, handwriting, write_csv, tmp_path, kind, layout, command):
    rows = handwriting(kind)
    write = as_json if layout == "json" else as_tsv
    section = files(**{split: write(of_split, split, tmp_path, write_csv) for split, of_split in rows.items()})
    section["build_info"]["images"] = {"storage": "digits"}
    run = {"test_splits": [], "caption_metrics": ["Bleu", "ROUGE_L", "CIDEr"]}
    if kind == "vqa":
        del run["caption_metrics"]
    run_file(f"custom_{kind}", section, **run)
    if layout == "shards":
        pack("run.yaml", "shards", max_count=4)
        section = {**files(train="shards/train", val="shards/val"), "shuffle_buffer": 3}
        run_file(f"wds_{kind}", section, **run)

    command("train")
    (checkpoint,) = tmp_path.glob("output/*/checkpoint_best.pth")
    command(
        *("evaluate", "model.load_finetuned=true", f"model.finetuned={checkpoint}"),
        *("run.test_splits=[val]", "run.output_dir=evaluated"),
    )

    (trained,), (folder,) = (list((tmp_path / name).iterdir()) for name in ("output", "evaluated"))
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["val"]["scored"] == len(rows["val"]) == metrics["provenance"]["samples"]["val"]
    assert metrics["provenance"]["data"] == {f"{'wds' if layout == 'shards' else 'custom'}_{kind}": "default"}
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert f"{len(rows['val'])} predictions; scored: {len(rows['val'])}." in report
    figures = dict(re.findall(r"^\| (\w+) \| +([\d.]+) \|$", report.replace("\\_", "_"), re.M))
    assert float(figures["loss"]) == pytest.approx(metrics["val"]["loss"], rel=1e-2)
    pictures = re.findall(r"!\[.*\]\((report/.*\.jpg)\)", report)
    assert pictures and all((folder / name).is_file() for name in pictures)

    # Each row of val once, under its image's name: in training's validation, in the evaluation, and in a spreadsheet.
    target, told = ("answer", "answers") if kind == "vqa" else ("caption", "references")
    expected = [(row["image"], row.get("question_id"), row.get("question"), [row[target]]) for row in rows["val"]]
    (validation,) = trained.glob("result/val*.json")
    (result,) = folder.glob("result/val*.json")
    with open(result.with_suffix(".csv"), encoding="utf-8", newline="") as file:
        spreadsheet = [{**row, told: json.loads(row[told])} for row in csv.DictReader(file)]
    for found in (*(json.loads(path.read_text(encoding="utf-8")) for path in (validation, result)), spreadsheet):
        names = [row["image"].replace(f"{tmp_path}/digits/", "") for row in found]  # shards know no folder of theirs
        told_of = [(row.get("question_id"), row.get("question"), row[told]) for row in found]
        assert [(name, *rest) for name, rest in zip(names, told_of)] == expected
        assert all("prediction" in row for row in found)


# ------------------------------------------------------------ docs/data.md


def blocks(section):
    """The fenced blocks of a section of the page: language, the file that the text before calls it, content."""
    text = PAGE.read_text(encoding="utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    pieces = re.split(r"^```(\w*)\n(.*?)^```$", text, flags=re.S | re.M)
    for before, language, content in zip(pieces[::3], pieces[1::3], pieces[2::3]):
        names = re.findall(r"`(\w+\.(?:py|yaml))`", before)
        yield language, names[-1] if names else None, content


def test_the_page_names_every_key():
    from lavis_kvmod.datasets.custom import CustomCaptionBuilder, CustomVQABuilder

    text = PAGE.read_text(encoding="utf-8")
    assert "[settings.md](settings.md#the-datasets-section)" in text
    for builder in (CustomVQABuilder, CustomCaptionBuilder):
        for key in builder.settings_class.tables["columns"].model_fields:
            assert f"`{key}" in text, key


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_walk_through_works_as_printed(tmp_path):
    commands = []
    for language, name, content in blocks("Train on your own folder of images"):
        if language in ("python", "yaml"):
            (tmp_path / name).write_text(content, encoding="utf-8")
        elif language == "bash":
            commands.append(content)
    done = subprocess.run(
        ["bash", "-c", "\n".join(["set -e", *commands])],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=1700,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"overall +(9\d|100)\.", done.stdout)  # of the evaluation's table
    said = done.stdout.strip().splitlines()[-1]
    assert said == "['blue']" and f"It says `{said}`" in PAGE.read_text(encoding="utf-8")
