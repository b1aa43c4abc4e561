"""What is in a cell of an annotation file: a text, many texts, an id, a weight.

Raises ValueError throughout for what cannot be meant; the message names the column's purpose.
"""

import ast
import io
import json
import math
import re
import tokenize
from typing import Any, Dict, List, Optional, Sequence, Union

from lavis_kvmod.system.text_cleaning import one_line

__all__ = [
    "TARGET_KEYS",
    "check_encodable",
    "first",
    "has_words",
    "is_nothing",
    "looks_like_a_list",
    "read_id",
    "read_name",
    "read_names",
    "read_text",
    "read_texts",
    "read_weight",
    "said",
    "short",
]

# Under what names data sets have what a model is to say.
TARGET_KEYS = {"answer": ("answer", "answers", "direct_answers"), "caption": ("caption", "captions")}

# NumPy's and pandas' ways to write a list, about the list: array(['a'], dtype=object), [np.str_('a')].
_ARRAY = re.compile(r"^array\((.*?)(?:,\s*dtype=[^()\[\]]+)?\)$", re.DOTALL)
_SCALAR = re.compile(r"""\bnp\.\w+\(('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[-+.\w]+)\)""")
_SURELY_A_LIST = re.compile(r"""^\[\s*['"{].*\]$""", re.DOTALL)
_MAYBE_A_LIST = re.compile(r"^\[[^\[\]]*,[^\[\]]*\]$")
_UNREADABLE = (ValueError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError)


def first(cells: Sequence[Any]) -> Any:
    """The first cell; None where there is none."""
    return cells[0] if cells else None


def said(annotation: Dict[str, Any], target: str) -> Any:
    """What an annotation has under the first of the `TARGET_KEYS` that is there, as it is; None for nothing."""
    return next((annotation[key] for key in TARGET_KEYS[target] if annotation.get(key) is not None), None)


def has_words(text: Optional[str]) -> bool:
    """Whether anything of a text is left by LAVIS's text processors, which drop punctuation."""
    return text is not None and re.search(r"\w", text) is not None


def is_nothing(cell: Any) -> bool:
    """Whether a cell is empty: None, or the NaN that pandas writes for it."""
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


def short(value: Any, length: int = 100) -> str:
    """A value as a message shows it: long ones without their middle."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= length else f"{text[: length - 20]}…{text[-15:]} ({len(text)} characters)"


def check_encodable(text: str, purpose: str) -> str:
    """The text. One with half a character in it, as of a torn emoji in JSON, no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{purpose}: half a character at {error.start} in {short(ascii(text))}") from None
    return text


def read_text(cell: Any, purpose: str) -> str:
    """A text on one line, without the space around it; a number is spelt out, and nothing is ''."""
    return one_line(read_name(cell, purpose))


def read_name(cell: Any, purpose: str) -> str:
    """As `read_text`, but with white space within it as it is, as file names may have it."""
    if isinstance(cell, dict) and purpose in cell:  # as VQA's and COCO's files: {"answer": "red", "answer_id": 1}
        cell = cell[purpose]
    if isinstance(cell, str):
        return check_encodable(cell.strip(), purpose)
    if is_nothing(cell):
        return ""
    if isinstance(cell, bool) or not isinstance(cell, (int, float)):
        hint = '; write yes and no, or "true" and "false" in quotes' if isinstance(cell, bool) else ""
        raise ValueError(f"{purpose}: expected a text, got {short(cell)}{hint}")
    return str(cell)


def read_names(cells: Sequence[Any], purpose: str) -> List[str]:
    """All names in some cells, as `read_name` reads one. A cell holds one, or a list of them, also as JSON in a text.
    Empty cells count for nothing."""
    names: List[str] = []
    for cell in cells:
        listed = _json_list(cell) if isinstance(cell, str) else cell
        entries = listed if isinstance(listed, (list, tuple)) else [cell]
        names += [name for name in (read_name(entry, purpose) for entry in entries) if name]
    return names


def _json_list(cell: str) -> Any:
    try:
        return json.loads(cell) if cell.strip().startswith("[") else None
    except ValueError:  # a name that begins with a bracket
        return None


def read_texts(cells: Sequence[Any], purpose: str, separator: Optional[str] = None) -> List[str]:
    """All texts in some cells. A cell holds one text, a list of them, such a list as JSON, Python, NumPy or pandas
    write it, or texts with ``separator`` between; a text may be an object that has it under ``purpose``. Empty cells
    count for nothing, empty entries of a list do."""
    texts: List[str] = []
    for cell in cells:
        if isinstance(cell, str):
            cell = _parts(cell.strip(), purpose, separator)
        if isinstance(cell, (list, tuple)):
            texts += [read_text(entry, purpose) for entry in cell]
        elif not is_nothing(cell):
            texts.append(read_text(cell, purpose))
    return texts


def looks_like_a_list(text: str) -> bool:
    """Whether a text that was read as one may have been meant as several: ``[red, dark red]``."""
    return _MAYBE_A_LIST.match(text) is not None


def _parts(cell: str, purpose: str, separator: Optional[str]) -> Sequence[Any]:
    listed = _listed(cell, purpose)
    if listed is not None:
        return listed
    pieces = cell.split(separator) if separator else [cell]
    return [piece.strip() for piece in pieces if piece.strip()]


def _listed(cell: str, purpose: str) -> Optional[Sequence[Any]]:
    """The entries of a list that was written into a cell; None for any other text, such as one in brackets."""
    cell = _ARRAY.sub(r"\1", cell)
    if not (cell[:1] in "[({" and cell[-1:] in "])}") or cell[:1] == "":
        return None
    for read in (json.loads, _python_value):
        try:
            value = read(cell)
        except _UNREADABLE:
            continue
        if isinstance(value, dict):
            return [value] if purpose in value else None
        if isinstance(value, (set, tuple)):  # (1, 2) may be what was seen; ('a', 'b') is Python
            return sorted(value, key=str) if isinstance(value, set) else value if _has_texts(value) else None
        if isinstance(value, list):
            return value
    if _SURELY_A_LIST.match(cell):
        raise ValueError(
            f'{purpose}: it begins as a list does, but cannot be read as one; write it as JSON, ["a", "b"] (and a text '
            f"with brackets of its own as such a list of one); got {short(cell)}"
        )
    return None


def _has_texts(values: Sequence[Any]) -> bool:
    return any(isinstance(value, str) for value in values)


def _python_value(cell: str) -> Any:
    """What a Python literal says; also of NumPy's form, which has no commas: ``['a' 'b']``.

    Raises:
        ValueError: for what is none, or where some commas are missing, or entries were left out (``...``).
    """
    written: List[str] = []
    depth, gaps, commas, ended = 0, 0, 0, False
    for token in tokenize.generate_tokens(io.StringIO(_SCALAR.sub(r"\1", cell)).readline):
        kind, text = token.type, token.string
        if kind in (tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER):
            continue
        is_value = kind in (tokenize.STRING, tokenize.NUMBER, tokenize.NAME)
        if ended and (is_value or text in ("[", "{")) and cell[0] == "[":
            gaps += depth == 1
            written.append(",")
        commas += text == "," and depth == 1
        depth += (text in ("[", "(", "{")) - (text in ("]", ")", "}"))
        ended = is_value or text in ("]", "}")
        written.append("None" if text in ("nan", "NaN", "null") else text)
    if (gaps and commas) or "..." in written:
        raise ValueError("some commas are missing, or entries")
    return ast.literal_eval(" ".join(written))


def read_id(cell: Any, purpose: str) -> Union[None, str, int, float]:
    """An id as it is, number or text; None for nothing."""
    if is_nothing(cell):
        return None
    if isinstance(cell, str):
        return cell.strip() or None
    if isinstance(cell, bool) or not isinstance(cell, (int, float)):
        raise ValueError(f"{purpose}: expected a number or a text, got {short(cell)}")
    return cell


def read_weight(text: Union[str, float]) -> float:
    """A finite number that is not negative."""
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise ValueError(f"weight: expected a number of 0 or more, got {text!r}")
    return weight
