"""The candidates of ``inference_method: rank`` that a file names: ``run.answer_list``, a data set's ``answer_list``, or
the list of a benchmark."""

import json
import logging
from pathlib import Path
from typing import Any, List, Optional, Sequence

from lavis_kvmod.datasets.bad_samples import BadDataError
from lavis_kvmod.datasets.storage import looked_for, places, stored

__all__ = ["answer_list_problem", "checked_answers", "read_answer_list"]


def read_answer_list(storage: str) -> List[str]:
    """The candidate answers in a file: a JSON list of strings, or plain text with one answer a line.

    Blank lines and repeated answers are left out, the latter with a log line.

    Args:
        storage: its path, looked for as `stored` does.

    Raises:
        BadDataError: if there is no such file, or it holds no answers, or something else.
    """
    path = stored(storage)
    if not path.is_file():
        raise BadDataError(f"no file {looked_for(places(storage))}")
    return checked_answers(_read(path), str(path))


def checked_answers(answers: Any, source: str) -> List[str]:
    """Answers without the space around them, each once.

    Args:
        answers: what should be a list of texts.
        source: where they are from, for messages.

    Raises:
        BadDataError: if it is something else, or holds no answers.
    """
    if not isinstance(answers, Sequence) or not all(isinstance(answer, str) for answer in answers):
        raise BadDataError(f'{source}: expected a list of strings, such as ["yes", "no"], got {_short(answers)}')
    stripped = [answer.strip() for answer in answers if answer.strip()]
    unique = list(dict.fromkeys(stripped))
    if not unique:
        raise BadDataError(f"{source} holds no answers")
    if len(unique) < len(stripped):
        logging.warning("%s: %d repeated answers were left out", source, len(stripped) - len(unique))
    return unique


def answer_list_problem(storage: Optional[str]) -> Optional[str]:
    """What keeps `read_answer_list` from reading ``storage``, or None."""
    try:
        if storage is not None:
            read_answer_list(storage)
    except BadDataError as error:
        return str(error)
    return None


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8-sig")
        return json.loads(text) if path.suffix.lower() == ".json" else text.splitlines()
    except (OSError, ValueError) as error:  # broken UTF-8 and JSON are ValueErrors
        raise BadDataError(f"{path} cannot be read as UTF-8 {path.suffix or 'text'}: {error}") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
