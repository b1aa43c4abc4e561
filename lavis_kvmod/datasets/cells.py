"""What is in a cell of an annotation file: a text, many texts, an id, a weight.

Raises ValueError throughout for what cannot be meant; the message names the column's purpose.
"""

import json
import math
from typing import Any, List, Optional, Sequence, Union

__all__ = ["first", "read_id", "read_text", "read_texts", "read_weight"]


def first(cells: Sequence[Any]) -> Any:
    """The first cell; None where there is none."""
    return cells[0] if cells else None


def read_text(cell: Any, purpose: str) -> str:
    """A text without the space around it; a number is spelt out, and nothing is ''."""
    if isinstance(cell, str):
        return cell.strip()
    if cell is None:
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
        elif cell is not None:
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
    if cell is None or isinstance(cell, str):
        return (cell or "").strip() or None
    if isinstance(cell, bool) or not isinstance(cell, (int, float)):
        raise ValueError(f"{purpose}: expected a number or a text, got {json.dumps(cell, ensure_ascii=False)}")
    return cell


def read_weight(text: str) -> float:
    """A finite number that is not negative."""
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise ValueError(f"weight: expected a number of 0 or more, got {text!r}")
    return weight
