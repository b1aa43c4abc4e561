"""`artquest`: ArtQuest's files under its own names, and one's own in its layout."""

import shutil
from pathlib import Path

import pytest
from lavis.common.registry import registry

from lavis_kvmod.datasets.artquest import ArtQuestBuilder

COLUMNS = ("image", "question", "answer", "question_type")
ROWS = [
    ("01-astronaut.png", "Who painted this?", "Rembrandt", "artist"),
    ("01-astronaut.png", "Which school is it of?", "Dutch", "school"),
    ("02-cat.png", "What is the title of it?", 'Still Life, called "The Cat"', "title"),
]


@pytest.fixture()
def cache_root(tmp_path, monkeypatch, shipped_photos, write_csv):
    """The files as their archives unpack: SemArt's pictures, ArtQuest's three tables."""
    images = tmp_path / "SemArt" / "Images"
    images.mkdir(parents=True)
    shutil.copy(shipped_photos / "astronaut.png", images / "01-astronaut.png")
    shutil.copy(shipped_photos / "chelsea.png", images / "02-cat.png")
    (tmp_path / "artquest").mkdir()
    for split in ("train", "val", "test"):
        write_csv(f"artquest/artquest_{split}.csv", [dict(zip(COLUMNS, row)) for row in ROWS])
    monkeypatch.setitem(registry.mapping["paths"], "cache_root", str(tmp_path))
    return tmp_path


def test_lavis_knows_the_builder():
    assert registry.get_builder_class("artquest") is ArtQuestBuilder


def test_its_own_names_need_no_settings(cache_root):
    datasets = ArtQuestBuilder().build_datasets()
    assert {split: len(dataset) for split, dataset in datasets.items()} == {"train": 3, "val": 3, "test": 3}
    row = datasets["test"].annotation[2]
    assert (row["question_id"], row["question_type"], row["image_id"]) == ("test-3", "title", "02-cat.png")
    assert row["answer"] == ['Still Life, called "The Cat"']
    assert datasets["train"].answer_list == ["Dutch", "Rembrandt", 'Still Life, called "The Cat"']
    assert datasets["train"][0]["image"].shape == (3, 224, 224)


def test_question_ids_and_types_are_optional(cache_root, write_csv):
    bare = [dict(zip(COLUMNS[:3], row)) for row in ROWS]
    write_csv("artquest/artquest_train.csv", [{**row, "question_id": f"aq{i}"} for i, row in enumerate(bare)])
    write_csv("artquest/artquest_val.csv", bare)
    datasets = ArtQuestBuilder().build_datasets()
    assert [row["question_id"] for row in datasets["train"].annotation] == ["aq0", "aq1", "aq2"]
    assert [row["question_id"] for row in datasets["val"].annotation] == ["val-1", "val-2", "val-3"]
    assert "question_type" not in datasets["val"].annotation[0]


def test_a_split_that_is_null_is_not_there(cache_root, section_of):
    (cache_root / "artquest" / "artquest_val.csv").unlink()
    section = section_of(ArtQuestBuilder, build_info={"annotations": {"val": None}})
    assert set(ArtQuestBuilder(section).build_datasets()) == {"train", "test"}


def test_what_is_missing_is_told_with_the_key_to_set(tmp_path, section_of, monkeypatch):
    monkeypatch.setitem(registry.mapping["paths"], "cache_root", str(tmp_path))
    found = "\n".join(ArtQuestBuilder.config_problems(section_of(ArtQuestBuilder)))
    assert (
        f"no folder {Path.cwd()}/SemArt/Images nor {tmp_path}/SemArt/Images (images); get the folder Images of SemArt "
        "(https://arxiv.org/abs/1810.09617), put it there, or set build_info.images.storage to yours"
    ) in found
    assert (
        f"no file {Path.cwd()}/artquest/artquest_train.csv nor {tmp_path}/artquest/artquest_train.csv (annotations of "
        "train); get the CSV files of https://zenodo.org/records/10453925, put them there, or set"
    ) in found
