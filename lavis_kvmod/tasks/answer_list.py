"""The candidates of ``inference_method: rank``, where a file (``run.answer_list``) names them, and not the data set."""

import json
import logging
from pathlib import Path
from typing import List, Optional, Union


def read_answer_list(path: Union[str, Path]) -> List[str]:
    """The candidate answers in a file: a JSON list of strings, or plain text with one answer a line.

    Blank lines and repeated answers are left out, the latter with a log line.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no answers, or something else.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        answers = json.loads(text) if path.suffix.lower() == ".json" else text.splitlines()
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 {path.suffix or 'text'}: {error}") from error
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f'{path}: expected a list of strings, such as ["yes", "no"], got {_short(answers)}')
    stripped = [answer.strip() for answer in answers if answer.strip()]
    unique = list(dict.fromkeys(stripped))
    if not unique:
        raise ValueError(f"{path} holds no answers")
    if len(unique) < len(stripped):
        logging.warning("%s: %d repeated answers were left out", path, len(stripped) - len(unique))
    return unique


def answer_list_problem(path: Optional[str]) -> Optional[str]:
    """What keeps `read_answer_list` from reading ``path``, or None."""
    if path is None:
        return None
    try:
        read_answer_list(path)
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    return None


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
