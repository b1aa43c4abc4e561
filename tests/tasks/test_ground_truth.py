import json
from types import SimpleNamespace

import pytest

from lavis_kvmod.tasks.ground_truth import Truth, captions_of, official_truth, read_official, truth_of
from lavis_kvmod.tasks.vqa_accuracy import accuracy


@pytest.mark.parametrize(
    "annotation, answers",
    [
        ({"answer": "red"}, ["red"]),  # gqa, vg_vqa
        ({"answer": ["red", "blue"]}, ["red", "blue"]),  # coco_vqa, ok_vqa, this package's
        ({"direct_answers": ["red"] * 10}, ["red"] * 10),  # aok_vqa
        ({"answers": [{"answer": "red", "answer_id": 1}]}, ["red"]),  # the official layout
        ({"answer": 2}, ["2"]),
        ({"answer": None, "answers": ["x"]}, ["x"]),
        ({"answer": "red\ntwo "}, ["red two"]),
        ({"answer": []}, []),
        ({}, []),
    ],
)
def test_answers_under_each_of_lavis_keys(annotation, answers):
    assert truth_of(annotation).answers == answers


def test_references_are_on_one_line():
    """As predictions are, or no prediction could equal them; without words there is no caption."""
    assert captions_of({"caption": ["a\ncat ", " \n", "two\tdogs"]}) == ["a cat", "two dogs"]
    assert accuracy("dark red", truth_of({"answer": ["dark\nred"] * 10}).answers) == 1.0


def test_types_are_kept():
    annotation = {"answer": "red", "question_type": "what colour", "answer_type": None}
    assert truth_of(annotation) == Truth(["red"], "what colour", "")


def test_a_file_that_the_data_set_names_is_the_truth_where_it_has_the_question(tmp_path):
    rows = [{"question_id": 7, "question_type": "what", "answer_type": "other", "answers": [{"answer": "cat"}] * 10}]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps({"annotations": rows}))
    official = official_truth(SimpleNamespace(coco_fmt_anno_file=str(path)))
    assert truth_of({"question_id": 7}, official) == Truth(["cat"] * 10, "what", "other")
    assert truth_of({"question_id": 8, "answer": "dog"}, official) == Truth(["dog"])
    assert official_truth(SimpleNamespace(coco_fmt_anno_file=None)) is None
    assert official_truth(SimpleNamespace()) is None


@pytest.mark.parametrize("text", ["[]", "{", '{"annotations": [{"question_id": 1}]}', '{"annotations": 3}'])
def test_a_file_in_another_layout_is_named(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json: expected VQA's official layout"):
        read_official(str(tmp_path / "a.json"))
    with pytest.raises(FileNotFoundError, match="no such annotation file"):
        read_official(str(tmp_path / "b.json"))


def test_captions():
    assert captions_of({"caption": "a cat"}) == ["a cat"]
    assert captions_of({"caption": ["a cat", " ", "a dog"]}) == ["a cat", "a dog"]
    assert captions_of({"caption": None}) == captions_of({}) == []
