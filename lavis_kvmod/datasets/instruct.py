"""``custom_instruct``: conversations about images, from LLaVA's files or in Hugging Face's form.

LLaVA (arXiv 2304.08485): ``conversations``, a list of ``{"from": "human" | "gpt", "value": text}``, with ``<image>``
where an image stands. Hugging Face: ``messages``, a list of ``{"role": "user" | "assistant" | "system", "content":
…}``, where the content is a text, or a list of parts of type ``text`` and ``image``.

In training a sample is a conversation, whose answers are all learnt; in evaluation each answer is asked for by itself,
behind its true history.
"""

import json
import logging
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from lavis_kvmod.datasets.annotated import AnnotatedDataset, Annotation, Sample, VQAEvalData
from lavis_kvmod.datasets.bad_samples import BadDataError
from lavis_kvmod.datasets.builder import Problem, Splits, VQABuilder, num_images
from lavis_kvmod.datasets.cells import first, is_nothing, read_id, read_name, read_names, short
from lavis_kvmod.datasets.custom import CustomBuilder
from lavis_kvmod.datasets.settings import CustomInstructSettings
from lavis_kvmod.system.text_cleaning import one_line
from lavis_kvmod.system.turns import MARK, Turn, marks_in

__all__ = ["CustomInstructBuilder", "InstructEvalData", "InstructTrainData"]

_SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
_SPEAKER, _SAID = ("from", "role"), ("value", "content")


class InstructTrainData(AnnotatedDataset):
    """Conversations, each with its images and all its ``turns``."""

    def _texts(self, annotation: Annotation) -> Sample:
        return {"turns": [tuple(turn) for turn in annotation["turns"]]}


class InstructEvalData(VQAEvalData):
    """Questions by id, each with the turns before it as its ``history``."""

    def _texts(self, annotation: Annotation) -> Sample:
        return {**super()._texts(annotation), "history": [tuple(turn) for turn in annotation["history"]]}

    def _question(self, annotation: Annotation) -> str:
        return str(annotation["question"])  # LAVIS's processors would take capitals and marks away


class _Told(NamedTuple):
    """A conversation as it was read: its turns, and the images that its messages name themselves."""

    turns: List[Turn]
    images: List[str]


class CustomInstructBuilder(CustomBuilder, VQABuilder):
    """``custom_instruct``: rows with images and a conversation."""

    DATASET_CONFIG_DICT = {"default": "configs/datasets/custom/defaults_instruct.yaml"}
    settings_class = CustomInstructSettings
    train_dataset_cls = InstructTrainData
    eval_dataset_cls = InstructEvalData
    REQUIRED = ()  # of two columns of conversations one is there, and messages may name their images

    def _texts(self, cells: Dict[str, List[Any]], separator: Optional[str]) -> Annotation:
        found = [cell for key in ("conversations", "messages") for cell in cells[key] if not is_nothing(cell)]
        if len(found) != 1:
            raise ValueError(f"expected one conversation, under 'conversations' or 'messages'; got {len(found)}")
        told = _read(found[0])
        named = read_names(cells["image"], "image") or told.images
        marks = marks_in(told.turns)
        if marks != len(named) and (marks, len(named)) != (0, 1):
            raise ValueError(f"expected an image for each {MARK}; got {marks} marks and {len(named)} images")
        return {
            "image": named[0] if len(named) == 1 else tuple(named),
            "turns": told.turns,
            "answer": [answer for _, answer in told.turns if answer is not None],
            "conversation_id": read_id(first(cells["id"]), "id"),
        }

    def _rows(self, path: Path, split: str, called: str) -> List[Annotation]:
        rows = super()._rows(path, split, called)
        for row in rows if split == "train" else ():
            if row.get("turns") and row["turns"][-1][1] is None:
                row["problem"] = f"its last question has no answer: {row['turns'][-1][0]!r}"
        return rows

    def annotations(self) -> Splits:
        """As of all files.

        Raises:
            BadDataError: also for a split in which no conversation has an image: then it rather lacks their column.
        """
        splits = super().annotations()
        problems = []
        for split, rows in splits.items():
            alone = sum(row["image"] == () for row in rows)
            if alone and alone == len(rows):
                names = " or ".join(self._names["image"])
                problems.append(
                    f"{split}: none of {alone} conversations has an image: expected names under {names!r}, or in the "
                    "messages; columns: {image: …} names another column"
                )
            elif alone:
                logging.info("%s: %d of %d conversations have no image: texts alone", split, alone, len(rows))
        if problems:
            raise BadDataError(problems)
        return splits

    def row_problem(self, row: Annotation, needs_target: bool) -> Optional[Problem]:
        """None more: what is wrong with a conversation shows when it is read."""
        return None

    def arrange(self, split: str, rows: List[Annotation]) -> List[Annotation]:
        """For training a row a conversation; for evaluation one an answer, with what was said before."""
        if split == "train":
            return rows
        arranged = []
        for number, row in enumerate(rows, start=1):
            given = row["conversation_id"]
            name = f"{split}-{number}" if given is None else given
            for i, (question, answer) in enumerate(row["turns"]):
                of_turn = {
                    "question_id": f"{name}-{i + 1}",
                    "question": question,
                    "history": row["turns"][:i],
                    "answer": [] if answer is None else [answer],
                }
                arranged.append({**row, **of_turn})
        return arranged

    @classmethod
    def most_images(cls) -> Tuple[int, str]:
        """One: each image of a conversation goes through the model by itself."""
        return 1, ""

    @classmethod
    def longest(cls, num_soft: int) -> Tuple[int, int, str]:
        """Of the conversation that takes the most positions in the language model at least: its images, its words (each
        a token or more), and where it was read."""
        splits = cls._prepared[1] if cls._prepared else {}
        sizes = [(num_images(row), _words(row), row["source"]) for rows in splits.values() for row in rows]
        return max(sizes, key=lambda size: size[0] * num_soft + size[1], default=(0, 0, ""))


def _words(row: Annotation) -> int:
    said = [text for turn in row["turns"] for text in turn if text is not None]
    return sum(len(text.split()) for text in said)


def _read(cell: Any) -> _Told:
    """A conversation from a list of messages, or from such a list as JSON.

    Raises:
        ValueError: for what is none, for turns that do not alternate, begin with an answer, or are empty.
    """
    messages = _listed(cell)
    images: List[str] = []
    said = [_message(message, images) for message in messages]
    begins = ""
    if said and said[0][0] == "system":  # LAVIS's language models have no place of its own for it
        begins = f"{said.pop(0)[1]} "
    wrong = [i for i, (speaker, _) in enumerate(said) if speaker != ("human", "gpt")[i % 2]]
    if wrong or not said:
        heard = ", ".join(speaker for speaker, _ in said[: wrong[0] + 1]) if wrong else "no turn"
        raise ValueError(f"expected turns of human and gpt by turns, the human's first; got {heard}")
    turns: List[Turn] = []
    for i in range(0, len(said), 2):
        question = (begins if i == 0 else "") + said[i][1]
        answer = said[i + 1][1] if i + 1 < len(said) else None
        for what, text in (("question", question.replace(MARK, "")), ("answer", answer)):
            if text is not None and not text.strip():
                raise ValueError(f"turn {i // 2 + 1}: its {what} is empty")
        if answer is not None and MARK in answer:
            raise ValueError(f"turn {i // 2 + 1}: its answer has {MARK}, where no image can stand; got {short(answer)}")
        turns.append((question, answer))
    return _Told(turns, images)


def _listed(cell: Any) -> Sequence[Any]:
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except ValueError:
            raise ValueError(f"expected a list of turns, as JSON; got {short(cell)}") from None
    messages = cell.tolist() if hasattr(cell, "tolist") else cell  # Parquet's, of NumPy
    if not isinstance(messages, (list, tuple)):
        raise ValueError(f"expected a list of turns, got {short(cell)}")
    return messages


def _message(message: Any, images: List[str]) -> Tuple[str, str]:
    """Who says what; names of images that stand in the message are added to ``images``."""
    if not isinstance(message, dict):
        raise ValueError(f"expected a turn with who says what, got {short(message)}")
    speaker = next((message[key] for key in _SPEAKER if key in message), None)
    if speaker not in _SPEAKERS:
        raise ValueError(f"expected one of {', '.join(_SPEAKERS)} to speak, got {short(speaker)}")
    content = next((message[key] for key in _SAID if message.get(key) is not None), "")
    parts = content.tolist() if hasattr(content, "tolist") else content
    if isinstance(parts, str):
        return _SPEAKERS[speaker], one_line(parts)
    if not isinstance(parts, (list, tuple)):
        raise ValueError(f"expected a text, or a list of parts, got {short(content)}")
    return _SPEAKERS[speaker], one_line(" ".join(_part(part, images) for part in parts))


def _part(part: Any, images: List[str]) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return str(part.get("text") or "")
    if kind == "image":
        name = next((part[key] for key in ("image", "path", "url") if isinstance(part.get(key), str)), None)
        images += [] if name is None else [read_name(name, "image")]
        return MARK
    raise ValueError(f"expected parts of type text or image, got {short(part)}")
