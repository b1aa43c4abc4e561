"""What is in a cell of an annotation file: a text, many texts, an id, a weight.

Raises ValueError throughout for what cannot be meant; the message names the column's purpose.
"""

import json
import math
import re
from typing import Any, List, Optional, Sequence, Union

__all__ = ["check_encodable", "first", "has_words", "is_nothing", "read_id", "read_text", "read_texts", "read_weight"]


def first(cells: Sequence[Any]) -> Any:
    """The first cell; None where there is none."""
    return cells[0] if cells else None


def has_words(text: Optional[str]) -> bool:
    """Whether anything of a text is left by LAVIS's text processors, which drop punctuation."""
    return bool(text) and re.search(r"\w", text) is not None


def is_nothing(cell: Any) -> bool:
    """Whether a cell is empty: None, or the NaN that pandas writes for it."""
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


def check_encodable(text: str, purpose: str) -> str:
    """The text. One with half a character in it, as of a torn emoji in JSON, no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{purpose}: half a character at {error.start} in {ascii(text)}") from None
    return text


def read_text(cell: Any, purpose: str) -> str:
    """A text without the space around it; a number is spelt out, and nothing is ''."""
    if isinstance(cell, str):
        return check_encodable(cell.strip(), purpose)
    if is_nothing(cell):
        return ""
    if isinstance(cell, bool) or not isinstance(cell, (int, float)):
        raise ValueError(f"{purpose}: expected a text, got {json.dumps(cell, ensure_ascii=False)}")
    return str(cell)


def read_texts(cells: Sequence[Any], purpose: str, separator: Optional[str] = None) -> List[str]:
    """All texts in some cells. A cell holds one text, a list of them, such a list written as JSON, or texts with
    ``separator`` between; empty cells count for nothing, empty entries of a list do."""
    texts: List[str] = []
    for cell in cells:
        if isinstance(cell, str):
            cell = _parts(cell.strip(), separator)
        if isinstance(cell, (list, tuple)):
            texts += [read_text(entry, purpose) for entry in cell]
        elif not is_nothing(cell):
            texts.append(read_text(cell, purpose))
    return texts


def _parts(cell: str, separator: Optional[str]) -> List[Any]:
    if cell.startswith("[") and cell.endswith("]"):
        try:
            return json.loads(cell)
        except ValueError:
            pass  # a text in brackets
    pieces = cell.split(separator) if separator else [cell]
    return [piece.strip() for piece in pieces if piece.strip()]


def read_id(cell: Any, purpose: str) -> Union[None, str, int, float]:
    """An id as it is, number or text; None for nothing."""
    if is_nothing(cell):
        return None
    if isinstance(cell, str):
        return cell.strip() or None
    if isinstance(cell, bool) or not isinstance(cell, (int, float)):
        raise ValueError(f"{purpose}: expected a number or a text, got {json.dumps(cell, ensure_ascii=False)}")
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
