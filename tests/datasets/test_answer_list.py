import json
import logging

import pytest

from lavis_kvmod.config.loading import load_config
from lavis_kvmod.datasets.answer_list import read_answer_list
from lavis_kvmod.datasets.builder import VQABuilder
from lavis_kvmod.system.schema import ConfigurationError


def test_json_and_text(tmp_path, caplog):
    (tmp_path / "a.json").write_text(json.dumps(["yes", " no ", "", "yes"]))
    (tmp_path / "a.txt").write_bytes("\ufeffyes\r\nno\n\ncafé\n".encode())
    with caplog.at_level(logging.WARNING):
        assert read_answer_list(tmp_path / "a.json") == ["yes", "no"]
    assert "1 repeated answers were left out" in caplog.text
    assert read_answer_list(tmp_path / "a.txt") == ["yes", "no", "café"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", b'{"yes": 0}', "expected a list of strings"),
        ("a.json", b"[1, 2]", "expected a list of strings"),
        ("a.json", b'["yes"', "cannot be read as UTF-8 .json"),
        ("a.txt", b"\xff\xfe\x00", "cannot be read as UTF-8 .txt"),
        ("a.txt", b"\n \n", "holds no answers"),
    ],
)
def test_what_is_no_answer_list_is_told_before_anything_is_loaded(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    options = [f"run.answer_list={tmp_path / name}", "run.inference_method=rnak", "run.num_ans_candidates=0"]
    with pytest.raises(ConfigurationError) as caught:
        load_config("projects/kvmod/demo_vqa.yaml", options)
    text = str(caught.value)
    assert "run.answer_list" in text and message in text and name in text
    assert "run.inference_method: expected generate or rank, got 'rnak'" in text
    assert "run.num_ans_candidates: expected a whole number above 0, got 0" in text


def test_caption_metrics_are_checked_too():
    with pytest.raises(ConfigurationError, match="run.caption_metrics: expected a list of Bleu, METEOR") as caught:
        load_config("projects/kvmod/demo_caption.yaml", ["run.caption_metrics=[CIDER]", "run.valid_loss=3"])
    assert "run.valid_loss: expected true or false, got 3" in str(caught.value)


def test_an_empty_answer_is_no_candidate():
    rows = [{"answer": ["red", "", " red "]}, {"answer": ["blue"]}]
    assert VQABuilder.answer_list(None, {"train": rows}) == ["red", "blue"]
