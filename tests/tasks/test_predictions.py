import csv
import json
import math

import pytest

from lavis_kvmod.models.language.soft_prompt import ScoredAnswer
from lavis_kvmod.tasks.predictions import confidence, write_predictions

ROWS = [
    {"instance_id": "0", "answers": ["a, b", 'say "c"'], "prediction": "x\ny", "answer": "x\ny", "accuracy": 1.0},
    {"instance_id": "1", "answers": [], "prediction": "café", "answer": "café", "confidence": float("nan")},
]


def test_both_files_say_the_same(tmp_path):
    json_path, csv_path = write_predictions(ROWS, tmp_path, "val_epoch3")
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["val_epoch3.csv", "val_epoch3.json"]
    rows = json.loads(json_path.read_text(encoding="utf-8"))
    assert rows == [ROWS[0], {**ROWS[1], "confidence": None}]
    with open(csv_path, encoding="utf-8", newline="") as file:
        cells = list(csv.DictReader(file))
    assert list(cells[0]) == ["instance_id", "answers", "prediction", "accuracy", "confidence"]
    assert [json.loads(row["answers"]) for row in cells] == [["a, b", 'say "c"'], []]
    assert [row["prediction"] for row in cells] == ["x\ny", "café"]


def test_a_failure_leaves_the_old_files(tmp_path):
    write_predictions(ROWS, tmp_path, "val")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UnicodeEncodeError):
        write_predictions([{"prediction": "\ud800"}], tmp_path, "val")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_confidence_is_the_probability_of_the_answer():
    got = confidence(ScoredAnswer("red", math.log(0.25), 2))
    assert got["confidence"] == pytest.approx(0.25)
    assert got["mean_log_prob"] == pytest.approx(math.log(0.5)) and got["num_tokens"] == 2


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", '=HYPERLINK("http://x","y")'])
def test_a_text_is_no_formula_of_a_spreadsheet(tmp_path, text):
    json_path, csv_path = write_predictions([{"id": text, "prediction": text, "log_prob": -0.5}], tmp_path, "val")
    assert json.loads(json_path.read_text(encoding="utf-8"))[0]["prediction"] == text
    with open(csv_path, encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row == {"id": f"'{text}", "prediction": f"'{text}", "log_prob": "-0.5"}
