"""``custom_vqa`` and ``custom_caption``: one's own annotation files and image folders, set from YAML alone.

All keys of a section are in docs/data.md.
"""

import difflib
import logging
from functools import cached_property
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Set, Tuple, Type, Union

from omegaconf import DictConfig, OmegaConf

from lavis_kvmod.datasets.annotated import Annotation
from lavis_kvmod.datasets.answer_list import checked_answers, read_answer_list
from lavis_kvmod.datasets.bad_samples import BadDataError
from lavis_kvmod.datasets.builder import AnnotationBuilder, CaptionBuilder, Splits, VQABuilder
from lavis_kvmod.datasets.cells import (
    first,
    looks_like_a_list,
    read_id,
    read_name,
    read_names,
    read_text,
    read_texts,
    read_weight,
    short,
)
from lavis_kvmod.datasets.settings import CustomCaptionSettings, CustomSettings, CustomVQASettings
from lavis_kvmod.datasets.splits import DEFAULT_SEED, split_by_image, split_problems
from lavis_kvmod.datasets.storage import looked_for, places, stored, strings
from lavis_kvmod.datasets.tables import Row, Table, read_table

__all__ = ["CustomBuilder", "CustomCaptionBuilder", "CustomVQABuilder"]


class CustomBuilder(AnnotationBuilder):
    """Reads the files; which columns there are is the subclasses'."""

    settings_class: Type[CustomSettings] = CustomSettings
    several_images = True
    REQUIRED: Tuple[str, ...] = ("image",)  # keys of ``columns`` that every file has
    files_from = ""  # how to get the annotations

    # ------------------------------------------------------------ which splits

    @classmethod
    def splits_given(cls, section: DictConfig) -> List[str]:
        """The splits a run may use: those with files, and those that ``split`` takes from train."""
        taken = [name for name in _mapping(section, "split") if name != "seed"]
        return list(dict.fromkeys([*_files_by_split(section), *taken]))

    @classmethod
    def splits_read(cls, section: DictConfig, used: Set[str], ranks: bool = False) -> Set[str]:
        """The splits whose files are needed for a run that uses ``used``; ``ranks``: the answers to rank, too."""
        return used | {"train"} if _mapping(section, "split") else used

    # ------------------------------------------------------------ from files to rows

    def annotations(self) -> Splits:
        """The rows of all files.

        Raises:
            BadDataError: listing what is wrong with the section's keys, and with whole files.
        """
        problems = self._missing_files()
        if problems:
            raise BadDataError(problems)
        splits: Splits = {}
        for split, names in _files_by_split(self.config).items():
            paths = [stored(name) for name in names]
            base_names = [path.name for path in paths]
            splits[split] = []
            for path in paths:
                called = path.name if base_names.count(path.name) == 1 else str(path)
                try:
                    splits[split] += self._rows(path, split, called)
                except BadDataError as error:
                    problems += error.problems
        if problems:
            raise BadDataError(problems)
        return splits

    def divide(self, splits: Splits) -> Splits:
        """``split: {val: 0.1, test: 0.1, seed: 42}`` takes images away from ``train``."""
        shares = dict(self.settings.split or {})
        seed = shares.pop("seed", DEFAULT_SEED)
        return {**splits, **split_by_image(splits["train"], shares, seed)} if shares else splits

    def _rows(self, path: Path, split: str, called: str) -> List[Annotation]:
        expected = [name for names in self._names.values() for name in names]
        options = {key: getattr(self.settings, key) for key in ("format", "delimiter", "encoding")}
        table = read_table(path, expected=expected, name=called, **options)
        columns = self._columns_in(table, split, called)
        separator = getattr(self.settings, f"{self.target}_separator", None)
        rows = [self._annotation(row, columns, separator) for row in table.rows]
        unclear = [text for row in rows for text in row.get(self.target) or () if looks_like_a_list(text)]
        if unclear:
            logging.warning(
                "%s: %d %ss look like lists, and are taken as one text each, such as %s; if they are lists, write them "
                'as JSON, ["a", "b"]',
                *(called, len(unclear), self.target, short(unclear[0])),
            )
        return rows

    def _annotation(self, row: Row, columns: Dict[str, List[str]], separator: Optional[str]) -> Annotation:
        annotation: Annotation = {"source": row.source, "image": None}
        if row.problem:
            return {**annotation, "problem": row.problem}
        cells = {key: [row.values.get(name) for name in names] for key, names in columns.items()}
        try:
            annotation["image"] = _images(cells["image"])
            if not annotation["image"] and cells.get("video"):
                annotation["image"] = read_name(first(cells["video"]), "video")
                annotation.update(frames=self.settings.frames, frames_by=self.settings.frames_by)
            annotation["image_id"] = read_id(first(cells["image_id"]), "image_id")
            annotation.update(self._texts(cells, separator))
        except ValueError as error:
            annotation["problem"] = str(error)
        return annotation

    def _texts(self, cells: Dict[str, List[Any]], separator: Optional[str]) -> Annotation:
        """What is asked and said, from the cells under each key. Raises ValueError for what makes no sense there."""
        raise NotImplementedError

    # ------------------------------------------------------------ columns

    @cached_property
    def _names(self) -> Dict[str, List[str]]:
        """The columns that are to be read for each key: as ``columns`` says, else the one of that name."""
        columns = self.settings_class.tables["columns"].check(self.settings.columns)[0]
        return {key: strings(names) for key, names in columns}

    def _columns_in(self, table: Table, split: str, called: str) -> Dict[str, List[str]]:
        """The columns to read for each key.

        Raises:
            BadDataError: listing those that should be there and are not.
        """
        problems, found = [], {}
        for key, names in self._names.items():
            missing = [name for name in names if name not in table.columns]
            others = [name for name in table.columns if name not in self._names]
            close = [_did_you_mean(name, others) for name in missing]
            # A file without answers or captions is for prediction; one with a misspelt column is not.
            shows = key == "image" and any(
                name in table.columns for name in self._names.get("video", ())
            )  # a video instead
            required = (key in self.REQUIRED and not shows) or (key == self.target and (split == "train" or any(close)))
            if missing and (required or key in self.settings.columns):
                wanted = ", ".join(repr(name) + hint for name, hint in zip(missing, close))
                problems.append(
                    f"{called}: expected a column {wanted} for columns.{key}; "
                    f"got {', '.join(map(repr, table.columns)) or 'none'}"
                )
            found[key] = [name for name in names if name in table.columns]
        if problems:
            raise BadDataError(problems)
        return found

    # ------------------------------------------------------------ the section

    @classmethod
    def section_problems(cls, section: DictConfig) -> List[str]:
        """What is wrong with the section's keys and values, and with its shares."""
        split = _mapping(section, "split")
        problems = split_problems(split, list(_files_by_split(section))) if split else []
        return [*super().section_problems(section), *problems]

    def _missing_files(self) -> List[str]:
        problems = []
        files = _files_by_split(self.config)
        for split, names in files.items():
            key = f"build_info.annotations.{split}.storage"
            if not names:
                problems.append(f"{key}: not set; set it to the annotation file, or to a list of files")
            missing = [looked_for(places(name)) for name in names if not stored(name).is_file()]
            how = f"{self.files_from}, or " if self.files_from else ""
            problems += [f"no file {path} (annotations of {split}); {how}set {key} to yours" for path in missing]
        if not files:
            problems.append(
                "build_info.annotations: names no file; set build_info.annotations.train.storage to the annotation file"
            )
        return problems


class CustomVQABuilder(CustomBuilder, VQABuilder):
    """``custom_vqa``: rows with an image, a question, and one answer or many."""

    DATASET_CONFIG_DICT = {"default": "configs/datasets/custom/defaults_vqa.yaml"}
    settings_class = CustomVQASettings
    REQUIRED = ("image", "question")

    @classmethod
    def splits_read(cls, section: DictConfig, used: Set[str], ranks: bool = False) -> Set[str]:
        """Also train, where it is there and its answers are the candidates for ranking."""
        train = _files_by_split(section).get("train")
        wanted = (
            ranks and section.get("answer_list") is None and train and all(stored(name).is_file() for name in train)
        )
        return super().splits_read(section, used, ranks) | ({"train"} if wanted else set())

    def _texts(self, cells: Dict[str, List[Any]], separator: Optional[str]) -> Annotation:
        texts: Annotation = {
            "question": read_text(first(cells["question"]), "question"),
            "question_id": read_id(first(cells["question_id"]), "question_id"),
        }
        if len(cells["answer"]) == len(cells["weight"]):  # they belong together, column by column
            pairs = [(a, w) for a, w in zip(cells["answer"], cells["weight"]) if read_texts([a], "answer", separator)]
            cells = {**cells, "answer": [a for a, _ in pairs], "weight": [w for _, w in pairs]}
        if cells["answer"]:
            texts["answer"] = read_texts(cells["answer"], "answer", separator)
        if cells["weight"]:
            texts["weight"] = [read_weight(text) for text in read_texts(cells["weight"], "weight", separator)]
        for key in ("question_type", "answer_type"):
            if cells[key]:
                texts[key] = read_text(first(cells[key]), key)
        return texts

    def answer_list(self, splits: Splits) -> Optional[List[str]]:
        """The section's ``answer_list``, else all answers of the train split."""
        given = self.settings.answer_list
        return super().answer_list(splits) if given is None else _answer_list(given)

    @classmethod
    def section_problems(cls, section: DictConfig) -> List[str]:
        """As for captions, and what is wrong with the list of answers."""
        problems = super().section_problems(section)
        try:
            cls(section).answer_list({})
        except BadDataError as error:
            problems.append(f"answer_list: {error}")
        return problems


class CustomCaptionBuilder(CustomBuilder, CaptionBuilder):
    """``custom_caption``: rows with an image and one caption or many; an image may have several rows."""

    DATASET_CONFIG_DICT = {"default": "configs/datasets/custom/defaults_caption.yaml"}
    settings_class = CustomCaptionSettings

    def _texts(self, cells: Dict[str, List[Any]], separator: Optional[str]) -> Annotation:
        if not cells["caption"]:
            return {}
        return {"caption": read_texts(cells["caption"], "caption", separator)}


def _images(cells: List[Any]) -> Union[str, Tuple[str, ...]]:
    """The name of a row's image, or those of several."""
    names = read_names(cells, "image")
    return tuple(names) if len(names) > 1 else "".join(names)


def _mapping(section: Any, key: str) -> Mapping[str, Any]:
    value = section.get(key)
    return value if OmegaConf.is_dict(value) else {}


def _files_by_split(section: DictConfig) -> Dict[str, List[str]]:
    """The annotation files of each split, as named; a split that is null is not there."""
    given = _mapping(_mapping(section, "build_info"), "annotations")
    return {
        split: strings(entry.get("storage") if OmegaConf.is_dict(entry) else entry)
        for split, entry in given.items()
        if entry is not None
    }


def _answer_list(given: Any) -> List[str]:
    """From a list in the YAML file, or from a file."""
    if isinstance(given, str):
        return read_answer_list(given)
    if not all(isinstance(answer, str) for answer in given):
        raise BadDataError(f"expected texts, got {given}; YAML wants yes, no and numbers in quotes")
    return checked_answers(given, "the list")


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
