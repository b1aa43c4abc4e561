"""What counts as nothing in a cell, and what no tokenizer takes."""

import math

import numpy as np
import pandas as pd
import pytest

from lavis_kvmod.datasets.cells import looks_like_a_list, read_id, read_name, read_text, read_texts


def test_nan_is_nothing():
    assert read_text(math.nan, "question") == ""
    assert read_texts([math.nan, "red"], "answer") == ["red"]
    assert read_id(math.nan, "question_id") is None


def test_half_a_character_is_told():
    with pytest.raises(ValueError, match="question: half a character at 2"):
        read_text("a \ud83d", "question")


def test_a_text_is_on_one_line_and_a_name_is_as_it_is():
    assert read_text(" dark\n red\t\u2028or\xa0so ", "answer") == "dark red or so"
    assert read_name(" my  photo.jpg ", "image") == "my  photo.jpg"


def test_what_is_shown_of_a_long_cell_is_short():
    with pytest.raises(ValueError) as told:
        read_text({"text": "x" * 50_000}, "answer")
    assert len(str(told.value)) < 200 and "50012 characters" in str(told.value)


ANSWERS = ["it's red", 'a "dark" red', "red, or so", "[sic]"]


@pytest.mark.parametrize(
    "written",
    [
        str(ANSWERS),
        str(np.array(ANSWERS)),
        str(np.array(ANSWERS, dtype=object)),
        repr(np.array(ANSWERS, dtype=object)),
        repr(np.array(ANSWERS)),
        str(tuple(ANSWERS)),
        str([{"answer": answer, "answer_id": i} for i, answer in enumerate(ANSWERS)]),
        str(np.array([{"answer": answer, "answer_confidence": "yes"} for answer in ANSWERS])),
        "[" + ", ".join(f"np.str_({answer!r})" for answer in ANSWERS) + "]",
    ],
)
def test_lists_as_python_numpy_and_pandas_write_them_into_a_cell(written, tmp_path):
    assert read_texts([written], "answer") == ANSWERS
    pd.DataFrame({"answer": [written]}).to_csv(tmp_path / "qa.csv")
    (cell,) = pd.read_csv(tmp_path / "qa.csv").answer
    assert read_texts([cell], "answer") == ANSWERS


def test_many_entries_over_several_lines():
    many = [f"answer {i}" for i in range(40)]
    assert "\n" in str(np.array(many)) and read_texts([str(np.array(many))], "answer") == many


def test_lists_of_numbers():
    assert list(map(float, read_texts([str(np.array([0.5, 0.25, 1]))], "weight"))) == [0.5, 0.25, 1]
    assert read_texts(["[0.5, 0.25]"], "weight") == ["0.5", "0.25"]


@pytest.mark.parametrize(
    "cell", ["['it's red', 'blue']", "['red' 'dark red', 'blue']", "['red' ... 'blue']", "['red, 'blue']"]
)
def test_what_begins_as_a_list_and_cannot_be_told_is_refused(cell):
    with pytest.raises(ValueError, match="answer: it begins as a list does, but cannot be read as one; write it as"):
        read_texts([cell], "answer")


@pytest.mark.parametrize("text", ["[sic]", "(laughs)", "(1, 2)", "('Hello')", "{x}", "[", "[red, dark red]"])
def test_a_text_in_brackets_stays_one(text):
    assert read_texts([text], "answer") == [text]
    assert looks_like_a_list(text) == (text == "[red, dark red]")


def test_an_answer_as_in_vqas_own_files():
    cell = [{"answer": "red", "answer_confidence": "yes", "answer_id": 1}, {"answer": "blue"}, "green"]
    assert read_texts([cell], "answer") == ["red", "blue", "green"]
    with pytest.raises(ValueError, match='answer: expected a text, got {"text": "red"}'):
        read_texts([[{"text": "red"}]], "answer")
