"""What counts as nothing in a cell, and what no tokenizer takes."""

import math

import pytest

from lavis_kvmod.datasets.cells import read_id, read_text, read_texts


def test_nan_is_nothing():
    assert read_text(math.nan, "question") == ""
    assert read_texts([math.nan, "red"], "answer") == ["red"]
    assert read_id(math.nan, "question_id") is None


def test_half_a_character_is_told():
    with pytest.raises(ValueError, match="question: half a character at 2"):
        read_text("a \ud83d", "question")
