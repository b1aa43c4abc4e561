"""Rows of an annotation file: CSV, TSV, JSON or JSON Lines, in any encoding, or Parquet.

What is wrong with a whole file is an error. What is wrong with one row stays with that row, as its ``problem``.

Texts are read by Python's own modules and not by pandas (tried with 3.0, ``dtype=str, keep_default_na=False``), which
loses what is promised here. CSV: a row with a field too many is cut, or ends the reading (C engine); text behind a
closing quotation mark becomes part of the cell (C), or its row is dropped unsaid (Python engine), as is all behind a
mark that is never closed. JSON: one broken line ends the whole reading, ids beyond 64 bits are refused, and ids become
fractions where one is missing.
"""

import codecs
import csv
import io
import json
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from lavis_kvmod.datasets.bad_samples import BadDataError

__all__ = ["FORMATS", "Row", "Table", "read_table"]

FORMATS = ("csv", "tsv", "json", "jsonl", "parquet")
_BY_SUFFIX = {".csv": "csv", ".txt": "csv", ".tsv": "tsv", ".tab": "tsv", ".json": "json"}
_BY_SUFFIX.update({".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".pq": "parquet"})
_DELIMITERS = (",", ";", "\t", "|")
_DELIMITER_NAMES = {"comma": ",", "semicolon": ";", "tab": "\t", "\\t": "\t", "pipe": "|"}
# Keys under which a JSON object may hold its rows.
_LISTS = ("annotations", "data")


class Row(NamedTuple):
    """One row: where it is from (``train.csv, row 12``), its values by column, and why it cannot be used, or None."""

    source: str
    values: Dict[str, Any]
    problem: Optional[str] = None


class Table(NamedTuple):
    """A file's columns, in the order met, and its rows."""

    path: Path
    columns: List[str]
    rows: List[Row]


def read_table(
    path: Path,
    *,
    format: Optional[str] = None,
    delimiter: Optional[str] = None,
    encoding: Optional[str] = None,
    expected: Sequence[str] = (),
    name: Optional[str] = None,
) -> Table:
    """Read a whole file.

    CSV and TSV have their column names in the first row; quoting is as spreadsheets write it ("" within quotes is ",
    quoted texts may run over lines). JSON is a list of objects, or an object with such a list under ``annotations`` or
    ``data``; JSON Lines is one object a line. Of Parquet only the expected columns are read, where there are any.

    Args:
        path: the file.
        format: one of `FORMATS`; by the file's ending where not given.
        delimiter: what separates CSV columns, such as ``;`` or ``tab``. Where not given it is the one of comma,
            semicolon, tab and bar that finds most of the expected columns in the first row, then most columns.
        encoding: a Python encoding name; UTF-8, with or without byte order mark, where not given.
        expected: columns that are probably there.
        name: what messages call the file; its base name where not given.

    Raises:
        BadDataError: for a file that is not there, or cannot be read as what it should be.
    """
    name = path.name if name is None else name
    format = _format(path, format)
    if format == "parquet":
        return Table(path, *_parquet_rows(path, expected, name))
    text = _decoded(path, encoding, name)
    if format == "json":
        rows = _json_rows(text, name)
    elif format == "jsonl":
        rows = list(_jsonl_rows(text, name))
    else:
        delimiter = "\t" if format == "tsv" and delimiter is None else delimiter
        return Table(path, *_csv_rows(text, delimiter, expected, name))
    columns = dict.fromkeys(column for row in rows for column in row.values)
    return Table(path, list(columns), rows)


def _format(path: Path, format: Optional[str]) -> str:
    if format is None:
        format = _BY_SUFFIX.get(path.suffix.lower())
        if format is None:
            raise BadDataError(
                f"{path}: what a file with the ending {path.suffix!r} holds is not known; "
                f"set format to one of {', '.join(FORMATS)}"
            )
    if format not in FORMATS:
        raise BadDataError(f"format: expected one of {', '.join(FORMATS)}; got {format!r}")
    return format


def _decoded(path: Path, encoding: Optional[str], name: str) -> str:
    encoding = encoding or "utf-8"
    try:
        codec = codecs.lookup(encoding).name
        "".encode(encoding)  # raises LookupError for codecs such as hex, which are not of texts
        # A byte order mark would become part of the first column's name.
        codec = "utf-8-sig" if codec == "utf-8" else encoding
    except (LookupError, TypeError):
        raise BadDataError(f"encoding: expected a name such as utf-8 or cp1252, got {encoding!r}") from None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadDataError(f"{name}: not readable: {error}") from error
    try:
        return content.decode(codec)
    except UnicodeDecodeError as error:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            remedy = "it begins as UTF-16 does: set encoding: utf-16"
        else:
            remedy = "set encoding to the file's, for example cp1252 (Windows) or latin-1"
        line = content.count(b"\n", 0, error.start) + 1
        raise BadDataError(
            f"{name}, line {line}: not {encoding}: byte 0x{content[error.start]:02x} at {error.start}; {remedy}"
        ) from error
    except UnicodeError as error:  # UTF-16 without its mark
        raise BadDataError(f"{name}: not {encoding}: {error}") from error


# ------------------------------------------------------------ CSV


def _csv_rows(text: str, delimiter: Optional[str], expected: Sequence[str], name: str) -> Tuple[List[str], List[Row]]:
    if not text.strip():
        raise BadDataError(f"{name}: the file is empty")
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a long cell is no mistake
    delimiter = _best_delimiter(text, expected) if delimiter is None else _DELIMITER_NAMES.get(delimiter, delimiter)
    if len(delimiter) != 1:
        raise BadDataError(f"delimiter: expected one character, or tab, comma, semicolon or pipe; got {delimiter!r}")
    # Strict: otherwise a quotation mark that is never closed swallows the rest of the file as one text.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = [column.strip() for column in next(reader)]
        while columns and not columns[-1]:  # (a nameless first column is pandas' index, and is passed over)
            columns.pop()
        twice = sorted({column for column in columns if column and columns.count(column) > 1})
        if twice:
            raise BadDataError(f"{name}: the first row names columns twice: {', '.join(twice)}")
        return [column for column in columns if column], list(_records(reader, columns, name))
    except csv.Error as error:
        raise BadDataError(
            f"{name}, line {reader.line_num}: {error}; within a quoted text, quotation marks are written twice "
            f'("") and the text ends with one'
        ) from error


def _records(reader: Any, columns: List[str], name: str) -> Iterator[Row]:
    for number, fields in enumerate(reader, start=2):  # as spreadsheets count: the columns' names are row 1
        if not any(field.strip() for field in fields):
            continue  # an empty line
        source = f"{name}, row {number}"
        values = {column: field for column, field in zip(columns, fields) if column}
        surplus = [field for field in fields[len(columns) :] if field.strip()]
        problem = None
        if surplus:
            problem = (
                f"expected {len(columns)} fields, got {len(fields)}; is a text with a delimiter in it not in quotation "
                f"marks? The surplus begins with {surplus[0]!r}"
            )
        yield Row(source, values, problem)


def _best_delimiter(text: str, expected: Sequence[str]) -> str:
    def found(delimiter: str) -> Tuple[int, int]:
        columns = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
        return len(set(expected) & {column.strip() for column in columns}), len(columns)

    return max(_DELIMITERS, key=found)  # the first of equals


# ------------------------------------------------------------ Parquet


def _parquet_rows(path: Path, expected: Sequence[str], name: str) -> Tuple[List[str], List[Row]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:  # not there, or one that wants a NumPy that LAVIS does not
        raise BadDataError(f"{name}: Parquet takes pyarrow ({error}): pip install 'pyarrow<26'") from error
    try:
        with ParquetFile(path) as file:
            columns = file.schema_arrow.names
            wanted = [column for column in columns if column in expected]
            found = file.read(columns=wanted or None).to_pylist()
    except (OSError, ArrowException) as error:
        raise BadDataError(f"{name}: not readable as Parquet: {error}") from error
    return columns, [Row(f"{name}, row {number}", values) for number, values in enumerate(found, start=1)]


# ------------------------------------------------------------ JSON


def _json_rows(text: str, name: str) -> List[Row]:
    try:
        content = json.loads(text)
    except ValueError as error:
        hint = "; if each line is an object of its own, set format: jsonl" if "Extra data" in str(error) else ""
        raise BadDataError(f"{name}: not valid JSON: {error}{hint}") from error
    if isinstance(content, dict):
        held = [key for key in _LISTS if isinstance(content.get(key), list)]
        if not held:
            keys = ", ".join(map(repr, content)) or "no keys"
            raise BadDataError(
                f"{name}: expected a list, or an object with a list under {' or '.join(_LISTS)}; got one with {keys}"
            )
        content = content[held[0]]
    if not isinstance(content, list):
        raise BadDataError(f"{name}: expected a list of objects, got {_kind(content)}")
    return [_object_row(entry, f"{name}, entry {number}") for number, entry in enumerate(content, start=1)]


def _jsonl_rows(text: str, name: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        source = f"{name}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            yield Row(source, {}, f"not valid JSON: {error.msg} (column {error.colno})")
        else:
            yield _object_row(entry, source)


def _object_row(entry: Any, source: str) -> Row:
    if isinstance(entry, dict):
        return Row(source, entry)
    return Row(source, {}, f"expected an object ({{…}}), got {_kind(entry)}")


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null" if value is None else "an object")
