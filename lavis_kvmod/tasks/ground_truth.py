"""What an answer or a caption is scored against: the data set's own annotations.

LAVIS's data sets keep answers under ``answer``, ``answers`` or ``direct_answers``, and some (``coco_vqa``, ``ok_vqa``)
leave them to files in VQA's official layout, which they name in ``coco_fmt_anno_file``.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

from lavis_kvmod.datasets.cells import said
from lavis_kvmod.system.text_cleaning import one_line


class Truth(NamedTuple):
    """The ground truth of a question; without ``answers`` it cannot be scored."""

    answers: List[str]
    question_type: str = ""
    answer_type: str = ""


def truth_of(annotation: Dict[str, Any], official: Optional[Dict[str, Truth]] = None) -> Truth:
    """The answers to a question, with its types where they are known.

    Args:
        annotation: the data set's entry of that question.
        official: what `read_official` gave. Where the question is in there, that is its ground truth, as in LAVIS's
            own evaluation.
    """
    known = (official or {}).get(str(annotation.get("question_id")))
    if known is not None:
        return known
    answers = said(annotation, "answer") or []
    # On one line, as predictions are; the official files are left as the official evaluation reads them.
    return Truth(
        list(map(one_line, _texts(answers))), annotation.get("question_type") or "", annotation.get("answer_type") or ""
    )


def captions_of(annotation: Dict[str, Any]) -> List[str]:
    """The captions of an image; empty where there are none."""
    return [caption for caption in map(one_line, _texts(annotation.get("caption") or [])) if caption]


@lru_cache(maxsize=2)  # a validation and a test split
def read_official(path: str) -> Dict[str, Truth]:
    """Question id (as text) -> its truth, from a file in VQA's official layout: ``{"annotations": [{"question_id",
    "question_type", "answer_type", "answers": [{"answer": …}, …]}, …]}``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not in that layout.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such annotation file: {path}")
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))["annotations"]
        return {
            str(row["question_id"]): Truth(
                _texts(row["answers"]), row.get("question_type") or "", row.get("answer_type") or ""
            )
            for row in rows
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected VQA's official layout, {{'annotations': [{{'question_id', 'answers': [{{'answer'}}]}}]}}"
            f"; got something else ({type(error).__name__}: {error})"
        ) from error


def official_truth(dataset: Any) -> Optional[Dict[str, Truth]]:
    """`read_official` of the file a LAVIS data set names, or None."""
    path = getattr(dataset, "coco_fmt_anno_file", None)
    return None if path is None else read_official(str(path))


def _texts(values: Any) -> List[str]:
    """One text or many, or the official files' dicts, as a list of texts."""
    if isinstance(values, (str, int, float)):
        values = [values]
    return [str(value["answer"] if isinstance(value, dict) else value) for value in values]
