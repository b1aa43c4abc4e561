"""Annotation files as spreadsheets, editors and scripts write them."""

import codecs
import json
import sys

import pandas as pd
import pytest

from lavis_kvmod.datasets.bad_samples import BadDataError
from lavis_kvmod.datasets.tables import read_table

ROWS = [
    {"image": "a.jpg", "question": "is it red?", "answer": "yes"},
    {"image": "b.jpg", "question": 'what does the sign say, "stop" or "go"?', "answer": "stop,\nreally"},
    {"image": "ünï.jpg", "question": "où est l’€?", "answer": "là"},
]


def values(table):
    return [row.values for row in table.rows]


def put(path, content, encoding="utf-8"):
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_csv_with_any_delimiter_and_quoting(write_csv, delimiter):
    table = read_table(write_csv("qa.csv", ROWS, delimiter), expected=["image", "question"])
    assert table.columns == ["image", "question", "answer"] and values(table) == ROWS
    assert [row.source for row in table.rows] == ["qa.csv, row 2", "qa.csv, row 3", "qa.csv, row 4"]
    assert all(row.problem is None for row in table.rows)


def test_the_delimiter_may_be_said(write_csv):
    path = write_csv("qa.csv", ROWS, ":")
    assert values(read_table(path, delimiter=":")) == ROWS
    assert values(read_table(write_csv("qa.tsv", ROWS, "\t"))) == ROWS
    assert values(read_table(write_csv("qa.txt", ROWS, "\t"), delimiter="tab")) == ROWS
    with pytest.raises(BadDataError, match="delimiter: expected one character, or tab, comma, .*got '::'"):
        read_table(path, delimiter="::")


def test_a_comma_within_the_header_does_not_mislead(tmp_path):
    path = put(tmp_path / "qa.csv", 'image;question;"answer, short, one, word"\na.jpg;who?;Ada\n')
    assert read_table(path, expected=["image", "question"]).columns == ["image", "question", "answer, short, one, word"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-8"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(write_csv, encoding):
    table = read_table(write_csv("qa.csv", ROWS, encoding=encoding))
    assert table.columns[0] == "image" and values(table) == ROWS


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_a_byte_order_mark_before_json(tmp_path, kind):
    text = json.dumps(ROWS) if kind == "json" else "".join(json.dumps(row) + "\r\n" for row in ROWS)
    path = put(tmp_path / f"qa.{kind}", codecs.BOM_UTF8 + text.encode())
    assert values(read_table(path)) == ROWS


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_other_encodings_are_named(write_csv, encoding):
    path = write_csv("qa.csv", ROWS, encoding=encoding)
    assert values(read_table(path, encoding=encoding)) == ROWS
    hint = "begins as UTF-16 does: set encoding: utf-16" if encoding == "utf-16" else "for example cp1252"
    with pytest.raises(BadDataError, match=rf"qa.csv, line \d+: not utf-8: byte 0x\w\w at \d+; .*{hint}"):
        read_table(path)


def test_the_line_of_the_first_foreign_byte_is_told(tmp_path):
    path = put(tmp_path / "qa.csv", b"image,question\na.jpg,what?\nb.jpg,caf\xe9?\n")
    with pytest.raises(BadDataError, match="qa.csv, line 3: not utf-8: byte 0xe9 at 36"):
        read_table(path)


@pytest.mark.parametrize("encoding", ["klingon", 8])
def test_an_unknown_encoding(write_csv, encoding):
    with pytest.raises(BadDataError, match="encoding: expected a name such as utf-8 or cp1252, got"):
        read_table(write_csv("qa.csv", ROWS), encoding=encoding)


def test_a_quotation_mark_that_is_never_closed_does_not_swallow_the_rest(tmp_path):
    path = put(tmp_path / "qa.csv", 'image,question\na.jpg,"what is it?\nb.jpg,who?\nc.jpg,why?\n')
    with pytest.raises(BadDataError, match="qa.csv, line 4: .*quotation marks are written twice"):
        read_table(path)


def test_text_behind_a_closing_quotation_mark(tmp_path):
    path = put(tmp_path / "qa.csv", 'image,question\na.jpg,what?\nb.jpg,"stop" or go?\n')
    with pytest.raises(BadDataError, match="qa.csv, line 3: .*quotation marks"):
        read_table(path)


def test_rows_that_are_too_short_or_empty(tmp_path):
    path = put(tmp_path / "qa.csv", "image,question,answer\n\nb.jpg\nc.jpg,who?,Ada,,\n , ,\n")
    short, good = read_table(path).rows
    assert short.values == {"image": "b.jpg"} and short.source == "qa.csv, row 3"
    assert good.values == {"image": "c.jpg", "question": "who?", "answer": "Ada"} and good.problem is None


def test_columns_without_a_name(tmp_path):
    """pandas writes its index first, and spreadsheets write empty columns last."""
    path = put(tmp_path / "qa.csv", ",image,question,,\n0,a.jpg,who?,,\n1,b.jpg,red, or blue?,\n")
    table = read_table(path)
    assert table.columns == ["image", "question"]
    assert table.rows[0].values == {"image": "a.jpg", "question": "who?"} and table.rows[0].problem is None
    assert table.rows[1].problem.startswith("expected 3 fields, got 5")


def test_an_unquoted_delimiter_is_a_problem_of_its_row(tmp_path):
    path = put(tmp_path / "qa.csv", "image,question,answer\na.jpg,red, or blue?,red\nb.jpg,who?,Ada\n")
    first, second = read_table(path).rows
    assert first.problem.startswith(
        "expected 3 fields, got 4; is a text with a delimiter in it not in quotation marks?"
    )
    assert second.problem is None


def test_columns_named_twice(tmp_path):
    with pytest.raises(BadDataError, match="qa.csv: the first row names columns twice: answer"):
        read_table(put(tmp_path / "qa.csv", "image,question,answer, answer\n"))


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_line_ends(tmp_path, newline):
    path = put(tmp_path / "qa.csv", newline.join(["image,question", "a.jpg,who?", ""]))
    assert values(read_table(path)) == [{"image": "a.jpg", "question": "who?"}]


@pytest.mark.parametrize("key", ["annotations", "data", None])
def test_json_lists_and_objects(tmp_path, key):
    content = ROWS if key is None else {"info": {}, key: ROWS}
    path = put(tmp_path / "qa.json", json.dumps(content))
    table = read_table(path)
    assert values(table) == ROWS and table.columns == list(ROWS[0])
    assert table.rows[2].source == "qa.json, entry 3"


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "not valid JSON"),
        ('[{"image": "a.jpg"}', "not valid JSON: .*line 1"),
        ('{"image": "a.jpg"}\n{"image": "b.jpg"}\n', "if each line is an object of its own, set format: jsonl"),
        ('{"images": [], "info": 1}', "an object with a list under annotations or data; got one with 'images', 'info'"),
        ("3", "expected a list of objects, got a number"),
    ],
)
def test_what_is_no_list_of_objects(tmp_path, content, message):
    with pytest.raises(BadDataError, match=f"qa.json: .*{message}"):
        read_table(put(tmp_path / "qa.json", content))


def test_an_entry_that_is_no_object(tmp_path):
    rows = read_table(put(tmp_path / "qa.json", '[{"image": "a"}, "b", null]')).rows
    assert [row.problem for row in rows] == [
        None,
        "expected an object ({…}), got a text",
        "expected an object ({…}), got null",
    ]


def test_jsonl_with_one_broken_line(write_jsonl):
    path = write_jsonl("qa.jsonl", ROWS)
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[1] = lines[1][:-9]
    put(path, "\n".join([lines[0], "", *lines[1:]]))
    good, broken, also = read_table(path).rows
    assert (good.problem, also.problem) == (None, None) and also.source == "qa.jsonl, line 4"
    assert broken.source == "qa.jsonl, line 3" and broken.problem.startswith("not valid JSON: Unterminated string")


def test_separators_of_unicode_do_not_break_lines(write_jsonl):
    rows = [{"question": "what\u2028is\x85it?"}]
    assert values(read_table(write_jsonl("qa.ndjson", rows))) == rows


def test_formats(tmp_path, write_csv):
    path = write_csv("qa.data", ROWS)
    with pytest.raises(BadDataError, match="the ending '.data' holds is not known; set format to one of csv, tsv"):
        read_table(path)
    assert values(read_table(path, format="csv")) == ROWS
    with pytest.raises(BadDataError, match="format: expected one of csv, tsv, json, jsonl, parquet; got 'xml'"):
        read_table(path, format="xml")


def test_empty_and_unreadable_files(tmp_path):
    with pytest.raises(BadDataError, match="qa.csv: the file is empty"):
        read_table(put(tmp_path / "qa.csv", "\n"))
    with pytest.raises(BadDataError, match="folder.csv: not readable"):
        (tmp_path / "folder.csv").mkdir()
        read_table(tmp_path / "folder.csv")


def test_a_codec_that_is_not_of_texts(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("question\nwhat?\n")
    with pytest.raises(BadDataError, match="encoding: expected a name"):
        read_table(path, encoding="hex")


@pytest.mark.parametrize("delimiter", [None, "comma"])
def test_a_long_cell_is_read_and_a_quote_left_open_is_told(tmp_path, delimiter):
    path, long = tmp_path / "rows.csv", "word " * 40_000
    path.write_text(f'question\n"{long}"\n')
    assert read_table(path, delimiter=delimiter).rows[0].values == {"question": long}
    path.write_text(f'"question\n{long}\n')
    with pytest.raises(BadDataError, match="quot"):
        read_table(path, delimiter=delimiter)


# ------------------------------------------------------------ Parquet

AS_THEY_ARE = {
    "image": ["a.jpg", "b.jpg", "c.jpg"],
    "question_id": ["007", "NA", "1e5"],
    "image_id": [2**53 + 1, None, 7],
    "answer": [["null", "it's"], [], ["nan"]],
    "weight": [[0.5, 0.25], [], None],
    "question": ["who?\nor what?", "", None],
}


@pytest.mark.parametrize("suffix", [".parquet", ".pq"])
def test_parquet_is_read_without_a_loss(tmp_path, suffix):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({**AS_THEY_ARE, "pixels": [b"x"] * 3}), tmp_path / f"qa{suffix}")
    table = read_table(tmp_path / f"qa{suffix}", expected=list(AS_THEY_ARE))
    assert values(table) == [dict(zip(AS_THEY_ARE, row)) for row in zip(*AS_THEY_ARE.values())]
    assert table.columns == [*AS_THEY_ARE, "pixels"] and table.rows[2].source == f"qa{suffix}, row 3"
    assert [type(row["image_id"]) for row in values(table)] == [int, type(None), int]
    assert values(read_table(tmp_path / f"qa{suffix}"))[0]["pixels"] == b"x"


def test_parquet_as_pandas_writes_it(tmp_path):
    pd.DataFrame(ROWS).to_parquet(tmp_path / "qa.parquet")
    assert values(read_table(tmp_path / "qa.parquet", expected=list(ROWS[0]))) == ROWS


def test_what_is_no_parquet(tmp_path, monkeypatch):
    path = put(tmp_path / "qa.parquet", "image,question\n")
    with pytest.raises(BadDataError, match="qa.parquet: not readable as Parquet: "):
        read_table(path)
    with pytest.raises(BadDataError, match="gone.parquet: not readable as Parquet: "):
        read_table(tmp_path / "gone.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(BadDataError, match="qa.parquet: Parquet takes pyarrow .*: pip install 'pyarrow<26'"):
        read_table(path)


@pytest.mark.parametrize("text", ["007", "NA", "null", "nan", "None", "1e5", "TRUE", "1_000", "0x10", "-", "#N/A"])
def test_no_text_is_taken_for_something_else(write_csv, write_jsonl, text):
    rows = [{"image": "a.jpg", "question_id": text, "answer": text}]
    assert values(read_table(write_csv("qa.csv", rows))) == values(read_table(write_jsonl("qa.jsonl", rows))) == rows
