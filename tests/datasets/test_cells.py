"""What counts as nothing in a cell, and what no tokenizer takes."""

import math

import pytest
from omegaconf import OmegaConf

from lavis_kvmod.datasets.bad_samples import BadDataError
from lavis_kvmod.datasets.builder import VQABuilder
from lavis_kvmod.datasets.cells import read_id, read_text, read_texts
from lavis_kvmod.datasets.shards.builders import _patterns
from lavis_kvmod.datasets.shards.files import find_shards
from lavis_kvmod.datasets.shards.rows import CAPTION, VQA


def test_nan_is_nothing():
    assert read_text(math.nan, "question") == ""
    assert read_texts([math.nan, "red"], "answer") == ["red"]
    assert read_id(math.nan, "question_id") is None


def test_half_a_character_is_told():
    with pytest.raises(ValueError, match="question: half a character at 2"):
        read_text("a \ud83d", "question")


@pytest.mark.parametrize(
    ("kind", "entry", "message"),
    [
        (VQA, {"question": "...", "answer": "red"}, "expected a question"),
        (VQA, {"question": "a \ud83d", "answer": "red"}, "half a character"),
        (VQA, {"question": "what?", "answer": "\ud83d"}, "half a character"),
        (VQA, {"question": "what?", "answer": "red", "weight": math.nan}, "weight: expected"),
        (VQA, {"question": "what?", "answer": "red", "weight": -1}, "weight: expected"),
        (VQA, {"question": "what?", "answer": ["red", "blue"], "weight": [0, 0]}, "all its weights are 0"),
        (CAPTION, {"caption": "!!!"}, "captions is empty"),
    ],
)
def test_an_entry_of_a_shard_that_no_model_can_take(kind, entry, message):
    with pytest.raises(ValueError, match=message):
        kind.parse(entry, None)


def test_a_brace_without_its_other_half_is_a_config_problem():
    with pytest.raises(BadDataError, match="brace without its other half"):
        find_shards(["train-{000..003.tar"])


def test_an_empty_answer_is_no_candidate():
    rows = [{"answer": ["red", "", " red "]}, {"answer": ["blue"]}]
    assert VQABuilder.answer_list(None, {"train": rows}) == ["red", "blue"]


def test_shards_of_a_split_may_be_named_bare():
    annotations = {"train": "a.tar", "val": ["b.tar", "c.tar"], "test": {"storage": "d.tar"}}
    section = OmegaConf.create({"build_info": {"annotations": annotations}})
    assert _patterns(section) == {"train": ["a.tar"], "val": ["b.tar", "c.tar"], "test": ["d.tar"]}
