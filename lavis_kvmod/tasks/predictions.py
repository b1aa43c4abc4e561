"""Predictions on the disk, as JSON (LAVIS's layout, a list of rows) and as CSV for a spreadsheet."""

import csv
import json
import math
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

from lavis_kvmod.weights.files import whole_or_nothing

# What both official evaluations call a prediction: in JSON beside `prediction`, so that they read the file as it is.
OFFICIAL_NAMES = ("answer", "caption")

# What makes a spreadsheet take a cell for a formula: an answer could otherwise run one where the file is opened.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def confidence(scored: Any) -> Dict[str, Any]:
    """The columns that say how sure the model was, of a ``ScoredAnswer``.

    ``confidence`` is the probability it gives to exactly these tokens, ``log_prob`` its logarithm (the sum over the
    tokens, the closing newline included), ``mean_log_prob`` that sum by token.
    """
    return {
        "confidence": math.exp(min(0.0, scored.log_prob)),
        "log_prob": scored.log_prob,
        "mean_log_prob": scored.mean_log_prob,
        "num_tokens": scored.num_tokens,
    }


def write_predictions(rows: Sequence[Dict[str, Any]], folder: Path, name: str) -> Tuple[Path, Path]:
    """Write ``folder/name.json`` and ``folder/name.csv``, each whole or not at all.

    The CSV is UTF-8 with a head line; lists (answers, references) are JSON within their cell. A text that a spreadsheet
    would take for a formula (it starts with ``=``, ``+``, ``-`` or ``@``) has an apostrophe before it there.
    """
    json_path, csv_path = folder / f"{name}.json", folder / f"{name}.csv"
    with whole_or_nothing(json_path) as temporary:
        temporary.write_text(to_json(rows), encoding="utf-8")
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in OFFICIAL_NAMES))
    with whole_or_nothing(csv_path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(map(_cell, columns))
        writer.writerows([_cell(row.get(column, "")) for column in columns] for row in rows)
    return json_path, csv_path


def to_json(value: Any) -> str:
    """``value`` as JSON; numbers that JSON cannot hold (NaN, infinities) are null."""
    return json.dumps(_finite(value), indent=1, ensure_ascii=False, default=str) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return json.dumps(value, ensure_ascii=False)
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA_STARTS) else value


__all__: List[str] = ["OFFICIAL_NAMES", "confidence", "to_json", "write_predictions"]
