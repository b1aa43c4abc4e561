"""`easy_vqa`: the package's own drawings and questions."""

import sys
from collections import Counter

import easy_vqa
import pytest
from lavis.common.registry import registry

from lavis_kvmod.datasets.easy_vqa import EasyVQABuilder


@pytest.fixture(scope="module")
def datasets():
    return EasyVQABuilder().build_datasets()


def test_lavis_knows_the_builder():
    assert registry.get_builder_class("easy_vqa") is EasyVQABuilder


def test_all_questions_are_there_and_no_drawing_is_in_two_splits(datasets):
    drawings = {split: {row["image"] for row in dataset.annotation} for split, dataset in datasets.items()}
    assert {split: len(of_split) for split, of_split in drawings.items()} == {"train": 3600, "val": 400, "test": 1000}
    assert len(set().union(*drawings.values())) == 5000
    assert len(datasets["train"]) + len(datasets["val"]) == len(easy_vqa.get_train_questions()[0]) == 38_575
    assert len(datasets["test"]) == 9_673
    assert {row["image"] for row in datasets["test"].annotation} <= set(easy_vqa.get_test_image_paths().values())
    ids = [row["question_id"] for dataset in datasets.values() for row in dataset.annotation]
    assert len(set(ids)) == len(ids)


def test_a_question_has_its_drawing_its_answer_and_its_type(datasets):
    row = datasets["test"].annotation[0]
    (question, *_), (answer, *_), (drawing, *_) = easy_vqa.get_test_questions()
    assert (row["question"], row["answer"]) == (question, [answer]) == ("what is the red shape?", ["triangle"])
    assert row["image"] == easy_vqa.get_test_image_paths()[drawing]
    assert (row["question_type"], row["answer_type"]) == ("shape", "other")
    sample = datasets["test"][0]
    assert sample["image"].shape == (3, 224, 224) and sample["image_key"].endswith(row["image"])

    by_type = {}
    for row in datasets["test"].annotation:
        by_type.setdefault(row["question_type"], Counter())[row["answer"][0]] += 1
    assert set(by_type) == {"shape", "colour", "has shape", "has colour"}
    assert set(by_type["shape"]) == {"circle", "rectangle", "triangle"}
    assert set(by_type["has shape"]) == set(by_type["has colour"]) == {"yes", "no"}
    assert sorted(set().union(*by_type.values())) == sorted(datasets["test"].answer_list)
    asked = {row["question"] for row in datasets["test"].annotation if row["question_type"] == "has colour"}
    assert "is no teal shape present?" in asked and not any("circle" in question for question in asked)


def test_few_drawings_are_the_first_ones_with_all_their_questions(datasets, section_of):
    section = section_of(EasyVQABuilder)
    section.train_drawings = 25
    assert EasyVQABuilder.config_problems(section) == []
    few = EasyVQABuilder(section).build_datasets()
    own = {split: [row["question_id"] for row in dataset.annotation] for split, dataset in few.items()}
    assert own["train"] == [row["question_id"] for row in datasets["train"].annotation][: len(own["train"])]
    assert len({row["image"] for row in few["train"].annotation}) == 25
    assert own["val"] == [row["question_id"] for row in datasets["val"].annotation]
    section.train_drawings = 0
    assert "train_drawings" in EasyVQABuilder.config_problems(section)[0]


def test_without_the_package_it_says_what_to_install(monkeypatch, section_of):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    (problem,) = EasyVQABuilder.config_problems(section_of(EasyVQABuilder))
    assert 'pip install "lavis-kvmod[demo]"' in problem
