"""A table of questions in, a table of answers out."""

import csv
import io
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Sequence

from lavis_kvmod.tasks.predictions import write_predictions

__all__ = ["MOST_QUESTIONS", "answers_table", "read_questions"]

MOST_QUESTIONS = 500


def read_questions(data: bytes) -> List[str]:
    """The column ``question`` of a CSV file (UTF-8, with a head line).

    Raises:
        ValueError: for another encoding, without that column, without a question, or for more than `MOST_QUESTIONS`.
    """
    try:
        rows = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        columns = rows.fieldnames or []
        if "question" not in columns:
            raise ValueError(f"the table needs a column named question; it has {', '.join(columns) or 'none'}")
        questions = [(row["question"] or "").strip() for row in rows]
    except UnicodeDecodeError as error:
        raise ValueError("the table is not UTF-8 text; save it as CSV in UTF-8") from error
    except csv.Error as error:
        raise ValueError(f"the table is no CSV: {error}") from error
    questions = [question for question in questions if question]
    if not questions:
        raise ValueError("the table has no question")
    if len(questions) > MOST_QUESTIONS:
        raise ValueError(f"the table has {len(questions)} questions; at most {MOST_QUESTIONS} are answered at once")
    return questions


def answers_table(rows: Sequence[Dict[str, Any]]) -> bytes:
    """A CSV file of rows, safe to open in a spreadsheet: see `write_predictions`."""
    with tempfile.TemporaryDirectory() as folder:
        _, path = write_predictions(rows, Path(folder), "answers")
        return path.read_bytes()
