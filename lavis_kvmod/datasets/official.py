"""Benchmark files as their makers publish them: where they should be, how to get them, and how to read VQA's layout."""

import contextlib
import gc
import json
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence

from lavis_kvmod.datasets.annotated import Annotation
from lavis_kvmod.datasets.bad_samples import BadDataError
from lavis_kvmod.datasets.storage import looked_for, places, stored

__all__ = [
    "BenchmarkFile",
    "answer_text",
    "answers_of",
    "entries",
    "entries_in",
    "image_path",
    "paths_of",
    "read_json",
    "read_vqa",
]

_IDS_SHOWN = 5


class BenchmarkFile(NamedTuple):
    """A file (or folder) that a user fetches once.

    Attributes:
        what: what needs it, such as a split.
        key: the config key of its path.
        storage: its path; relative means below where the user stands, or below LAVIS's cache root.
        url: where to get it: an archive, or a page.
    """

    what: str
    key: str
    storage: Optional[str]
    url: Optional[str] = None

    @classmethod
    def from_config(cls, what: str, key: str, entry: Any) -> "BenchmarkFile":
        """From ``{storage: …, url: …}``, or a bare path."""
        if not isinstance(entry, Mapping) and not hasattr(entry, "items"):
            return cls(what, key, entry)
        return cls(what, f"{key}.storage", entry.get("storage"), entry.get("url"))

    @property
    def path(self) -> Path:
        """Where it is looked for."""
        return stored(self.storage or "")

    def problem(self) -> Optional[str]:
        """Why it cannot be read, which it is, where it was looked for and how to get it; or None."""
        if not self.storage:
            return f"{self.what}: {self.key} is not set; set it to the path of the file"
        if self.path.is_file():
            return None
        here = f"{self.what}: no file {looked_for(places(self.storage))}"
        if self.url is None:
            return f"{here}; set {self.key} to yours"
        put = "unpack" if self.url.endswith((".zip", ".tar.gz", ".tgz")) else "put"
        return f"{here}; get {self.url} and {put} it there, or set {self.key} to yours"


def paths_of(files: Sequence[BenchmarkFile]) -> List[Path]:
    """The files' paths.

    Raises:
        BadDataError: listing all that are missing.
    """
    problems = [problem for file in files for problem in [file.problem()] if problem]
    if problems:
        raise BadDataError(problems)
    return [file.path for file in files]


def read_json(path: Path, object_hook: Optional[Callable] = None) -> Any:
    """What a JSON file holds; ``object_hook`` as for ``json.load``.

    Raises:
        BadDataError: if it is not JSON, naming the file.
    """
    try:
        with open(path, encoding="utf-8") as file, _nothing_to_collect():
            return json.load(file, object_hook=object_hook)
    except (ValueError, OSError) as error:  # broken UTF-8 is a ValueError, too
        raise BadDataError(f"{path}: not readable as JSON ({error}); is it whole? Fetch it again") from error


@contextlib.contextmanager
def _nothing_to_collect() -> Iterator[None]:
    """Millions of new objects that all stay: looking for garbage among them would take a third of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def entries(path: Path, key: str, object_hook: Optional[Callable] = None) -> List[Dict[str, Any]]:
    """The list under ``key`` of a file in VQA's (and COCO's) layout; ``object_hook`` as for ``json.load``.

    Raises:
        BadDataError: if it has another layout, telling which.
    """
    return entries_in(read_json(path, object_hook), path, key)


def entries_in(content: Any, path: Path, key: str) -> List[Dict[str, Any]]:
    """`entries`, of what has been read from ``path``."""
    found = content.get(key) if isinstance(content, dict) else None
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        got = f"an object with {', '.join(map(repr, content)) or 'nothing'}" if isinstance(content, dict) else "a list"
        raise BadDataError(f'{path}: expected the official layout, {{"{key}": [{{…}}, …]}}; got {got}')
    return found


def read_vqa(questions: Path, annotations: Optional[Path], image_pattern: str) -> List[Annotation]:
    """The rows of one split in the layout of visualqa.org: all its questions, in the file's order, with their answers.

    Args:
        questions: ``{"questions": [{"question_id", "image_id", "question"}, …]}``.
        annotations: ``{"annotations": [{"question_id", "image_id", "question_type", "answer_type",
            "multiple_choice_answer", "answers": [{"answer"}, …]}, …]}``; None where the answers are not published.
        image_pattern: an image's path by its id, such as ``val2014/COCO_val2014_{image_id:012d}.jpg``.

    Raises:
        BadDataError: for files of another layout, or that do not belong together.
    """
    with _nothing_to_collect():
        asked = _by_question(questions, "questions", ("question_id", "image_id", "question"))
        answered = {}
        if annotations is not None:
            answered = _by_question(annotations, "annotations", ("question_id", "answers"), answer_text)
            _check_they_match(questions, asked, annotations, answered)
        return [
            {
                "image": image_path(image_pattern, entry["image_id"], questions),
                "image_id": entry["image_id"],
                "question": entry["question"],
                "question_id": question_id,
                "source": f"{questions.name}, question {question_id}",
                **(answers_of(answered[question_id], annotations) if annotations else {}),
            }
            for question_id, entry in asked.items()
        ]


def _by_question(
    path: Path, key: str, needed: Sequence[str], object_hook: Optional[Callable] = None
) -> Dict[Any, Dict[str, Any]]:
    found: Dict[Any, Dict[str, Any]] = {}
    twice = []
    for number, entry in enumerate(entries(path, key, object_hook)):
        missing = [name for name in needed if name not in entry]
        if missing:
            raise BadDataError(f"{path}: entry {number} of {key!r} has no {', '.join(missing)}")
        if found.setdefault(entry["question_id"], entry) is not entry:
            twice.append(entry["question_id"])
    if twice:
        raise BadDataError(f"{path}: {len(twice)} question ids are used more than once, such as {_some(twice)}")
    return found


def _check_they_match(questions: Path, asked: Mapping, annotations: Path, answered: Mapping) -> None:
    unanswered = [question_id for question_id in asked if question_id not in answered]
    unasked = [question_id for question_id in answered if question_id not in asked]
    elsewhere = [
        question_id
        for question_id, entry in answered.items()
        if question_id in asked
        and entry.get("image_id", asked[question_id]["image_id"]) != asked[question_id]["image_id"]
    ]
    faults = []
    if unanswered:
        faults.append(f"{len(unanswered)} of {len(asked)} questions have no annotation, such as {_some(unanswered)}")
    if unasked:
        faults.append(f"{len(unasked)} of {len(answered)} annotations have no question, such as {_some(unasked)}")
    if elsewhere:
        faults.append(f"{len(elsewhere)} questions are about another image there, such as {_some(elsewhere)}")
    if faults:
        raise BadDataError(f"{questions} and {annotations} are not of the same split: {'; '.join(faults)}")


def answer_text(content: Dict[str, Any]) -> Any:
    """An object hook that turns ``{"answer": …, "answer_confidence": …, "answer_id": …}`` into the answer's text.

    VQAv2 has millions of them, and few answers that differ: read like this they take a third of the memory.
    """
    return sys.intern(str(content["answer"])) if "answer" in content and "answers" not in content else content


def answers_of(entry: Dict[str, Any], path: Path) -> Dict[str, Any]:
    """``answer``, ``question_type`` and ``answer_type`` of an annotation, read with `answer_text`.

    Raises:
        BadDataError: if its answers are something else.
    """
    answers = entry.get("answers")
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        where = f"{path}: question {entry.get('question_id')}"
        raise BadDataError(f'{where}: expected answers as [{{"answer": …}}, …], got {answers!r}')
    types = {key: sys.intern(str(entry[key])) for key in ("question_type", "answer_type") if entry.get(key)}
    return {"answer": answers, **types}


def image_path(pattern: str, image_id: Any, path: Path) -> str:
    """An image's path below the images' folder, by its id in the file ``path``.

    Raises:
        BadDataError: if they do not fit each other.
    """
    try:
        return pattern.format(image_id=image_id)
    except (ValueError, KeyError, IndexError) as error:
        raise BadDataError(
            f"{path}: image_id {image_id!r} does not fit the images' pattern {pattern!r} ({error}); expected something "
            "like val2014/COCO_val2014_{image_id:012d}.jpg"
        ) from error


def _some(ids: Sequence[Any]) -> str:
    more = ", …" if len(ids) > _IDS_SHOWN else ""
    return ", ".join(map(str, ids[:_IDS_SHOWN])) + more
