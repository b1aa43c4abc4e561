"""From a data set's section in a run file to its splits: what all builders over annotations share.

A builder says how to get from its files to annotations (`AnnotationBuilder.annotations`). All else is here: images are
found in their folders, every row is checked, and everything that is wrong is told at once, before a model is loaded.
"""

import logging
from collections import Counter
from functools import partial
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Type, Union

from omegaconf import DictConfig, OmegaConf

from lavis_kvmod.datasets.annotated import (
    AnnotatedDataset,
    Annotation,
    CaptionEvalData,
    CaptionTrainData,
    VQAEvalData,
    VQATrainData,
)
from lavis_kvmod.datasets.bad_samples import BadDataError, BadSamplePolicy, some_of
from lavis_kvmod.datasets.cells import has_words
from lavis_kvmod.datasets.image_folders import ImageFolders, MissingImageError, OutsideImageError
from lavis_kvmod.datasets.images import BadImageError
from lavis_kvmod.datasets.packaged import PackagedBuilder
from lavis_kvmod.datasets.settings import DataSettings, FileSettings, ImagesSettings, SampleSettings
from lavis_kvmod.datasets.storage import looked_for, places, stored, strings
from lavis_kvmod.datasets.video import header_problem
from lavis_kvmod.system.text_cleaning import one_line

__all__ = ["AnnotationBuilder", "CaptionBuilder", "VQABuilder"]

Splits = Dict[str, List[Annotation]]


class Problem(NamedTuple):
    """What is wrong with a row: in a word or two, to be counted, and in a sentence."""

    kind: str
    text: str


class AnnotationBuilder(PackagedBuilder):
    """A LAVIS builder over lists of annotations. Subclass `VQABuilder` or `CaptionBuilder`.

    To implement: `annotations`, and ``DATASET_CONFIG_DICT`` with the path of a default YAML of this package.
    """

    # What `config_problems` has prepared and checked, so that `build` need not do it again: (section, splits).
    _prepared: Optional[Tuple[str, Splits]] = None

    # ------------------------------------------------------------ for subclasses

    def annotations(self) -> Splits:
        """The rows of each split, in the form `lavis_kvmod.datasets.annotated` describes, but for two things:
        ``image`` is the name the row gives (see `ImageFolders.find`; where `image_folders` is None, an absolute path),
        and ``image_id`` and ``question_id`` may be absent or None: they are then made up.

        A row that cannot be used has a ``problem``: a text that says why.

        Raises:
            BadDataError: for what is wrong with whole files.
        """
        raise NotImplementedError

    def divide(self, splits: Splits) -> Splits:
        """Move good rows between splits, once their images have been found."""
        return splits

    def arrange(self, split: str, rows: List[Annotation]) -> List[Annotation]:
        """Bring a split's good rows into the form its data set wants."""
        return rows

    def row_problem(self, row: Annotation, needs_target: bool) -> Optional[Problem]:
        """What is wrong with a row, its image aside."""
        raise NotImplementedError

    settings_class: Type[DataSettings] = SampleSettings
    target: str  # the key of what a model is to say: "answer" or "caption"
    several_images = False  # whether a row may have more than one
    images_from = ""  # how to get them

    # ------------------------------------------------------------ what LAVIS calls

    def build(self) -> Dict[str, AnnotatedDataset]:
        """The data sets of all splits.

        Raises:
            BadDataError: listing all that is wrong.
        """
        self.build_processors()
        splits = self._take_prepared() or self.prepare()
        policy = BadSamplePolicy.from_config(self.config)
        answers = self.answer_list(splits)
        datasets = {}
        for split, rows in splits.items():
            stage = "train" if split == "train" else "eval"
            dataset_cls = self.train_dataset_cls if split == "train" else self.eval_dataset_cls
            processors = self.vis_processors[stage], self.text_processors[stage]
            datasets[split] = dataset_cls(*processors, rows, policy=policy, answer_list=answers)
        return datasets

    def answer_list(self, splits: Splits) -> Optional[List[str]]:
        """The answers to choose from, for tasks that rank them."""
        return None

    # ------------------------------------------------------------ checks

    @classmethod
    def config_problems(cls, section: DictConfig) -> List[str]:
        """All that is wrong with the section and the files it names."""
        cls._prepared = None
        try:
            cls._prepared = (OmegaConf.to_yaml(section), cls(section).prepare())
        except BadDataError as error:
            return error.problems
        return []

    @classmethod
    def most_images(cls) -> Tuple[int, str]:
        """How many images the row with the most has, and where it was read, of what `config_problems` has prepared."""
        splits = cls._prepared[1] if cls._prepared else {}
        found = [(num_images(row), row["source"]) for rows in splits.values() for row in rows]
        return max(found, key=lambda each: each[0], default=(1, ""))

    def _take_prepared(self) -> Optional[Splits]:
        cls = type(self)
        prepared, cls._prepared = cls._prepared, None
        if prepared is None or not OmegaConf.is_config(self.config):
            return None
        return prepared[1] if prepared[0] == OmegaConf.to_yaml(self.config) else None

    def prepare(self) -> Splits:
        """All splits' annotations: read, their images found, their rows checked.

        Raises:
            BadDataError: listing all that is wrong.
        """
        problems = self.section_problems(self.config)
        folders = _collect(problems, self.image_folders)
        splits = _collect(problems, self.annotations)
        if problems:
            raise BadDataError(problems)
        policy = BadSamplePolicy.from_config(self.config)
        known: Dict[str, Found] = {}
        for split, rows in splits.items():
            for number, row in enumerate(rows, start=1):
                if folders is not None:
                    _find_image(row, folders, known)
                if row.get("question_id") is None and "question" in row:
                    row["question_id"] = f"{split}-{number}"
                if row.get(self.target):
                    row[self.target] = [one_line(text) for text in row[self.target]]
        # Rows first, then splits: what is wrong with every row of train would else be told as too few images.
        splits = {
            split: _collect(problems, partial(self._check, split, rows, policy)) for split, rows in splits.items()
        }
        if problems:
            raise BadDataError(problems)
        return {split: self.arrange(split, rows) for split, rows in self.divide(splits).items()}

    def image_folders(self) -> Optional[ImageFolders]:
        """The folders under ``build_info.images.storage``; None where rows carry paths that need no search.

        Raises:
            BadDataError: for folders that are not named or not there.
        """
        key = "build_info.images.storage"
        images = ImagesSettings.check(FileSettings.check(self.settings.build_info)[0].images)[0]
        roots = strings(images.storage)
        if not roots:
            raise BadDataError(f"{key}: not set; set it to the folder of the images, or to a list of folders")
        missing = [looked_for(places(root)) for root in roots if not stored(root).is_dir()]
        if missing:
            how = f"{self.images_from}, or " if self.images_from else ""
            raise BadDataError([f"no folder {path} (images); {how}set {key} to yours" for path in missing])
        return ImageFolders([stored(root) for root in roots], images.allow_outside)

    def _check(self, split: str, rows: Sequence[Annotation], policy: BadSamplePolicy) -> List[Annotation]:
        """The rows that can be used."""
        if not rows:
            raise BadDataError(f"{split}: no rows")
        has_targets = any(row.get(self.target) for row in rows)
        good: List[Annotation] = []
        bad: List[Tuple[Annotation, Problem]] = []
        seen: Dict[Any, Annotation] = {}
        for row in rows:
            problem = self._problem(row, has_targets, seen)
            if problem is None:
                good.append(row)
            else:
                bad.append((row, problem))
        kinds = Counter(problem.kind for _, problem in bad)
        counts = ", ".join(f"{count} × {kind}" for kind, count in kinds.most_common())
        lines = [f"{row['source']}: {problem.text}" for row, problem in bad]
        problems: List[str] = []
        if not has_targets and not any(row.get("problem") for row in rows):  # a broken row's target is not known
            if split == "train":
                problems.append(f"train: none of {len(rows)} rows has an entry under {self.target!r} to learn from")
            else:
                logging.warning("%s has no %ss: predictions will be written, not scored", split, self.target)
        what = f"rows of {split}" + (f" ({counts})" if counts else "")
        _collect(problems, lambda: policy.judge(lines, len(rows), what))
        if not good and not problems:
            problems.append(f"{split}: none of {len(rows)} rows can be used{some_of(lines)}")
        if problems:
            raise BadDataError(problems)
        return good

    def _problem(self, row: Annotation, needs_target: bool, seen: Dict[Any, Annotation]) -> Optional[Problem]:
        """What is wrong with a row; ``seen`` has the first row with each id."""
        if row.get("problem"):
            return Problem("broken row", row["problem"])
        problem = self.row_problem(row, needs_target) or row.get("image_problem")
        if problem is not None:
            return problem
        if num_images(row) > 1 and not self.several_images:
            return Problem("several images", f"expected one image, got {num_images(row)}: {row['image_name']}")
        question = row.get("question_id")
        first = row if question is None else seen.setdefault(("question", question), row)
        if first is not row:
            return Problem("question_id used twice", f"question_id {question!r} has been used in {first['source']}")
        first = seen.setdefault(("image", row["image_id"]), row)
        if first["image"] != row["image"]:
            return Problem(
                "image_id used twice",
                f"image_id {row['image_id']!r} has been used for {first['image']} in {first['source']}",
            )
        return None


class VQABuilder(AnnotationBuilder):
    """Questions and answers."""

    train_dataset_cls = VQATrainData
    eval_dataset_cls = VQAEvalData
    target = "answer"

    def row_problem(self, row: Annotation, needs_target: bool) -> Optional[Problem]:
        """No question, no answer, or weights that do not fit the answers."""
        if not has_words(row.get("question")):
            return Problem("empty question", f"expected a question, got {row.get('question')!r}")
        answers = row.get("answer") or []
        if not all(answer.strip() for answer in answers):
            return Problem("empty answer", f"one of its answers is empty: {answers!r}")
        if needs_target and not answers:
            return Problem("no answer", "it has no answer, where other rows have")
        weights = row.get("weight")
        if weights and len(weights) != len(answers):
            return Problem("weights", f"{len(weights)} weights for {len(answers)} answers")
        if weights and not sum(weights):
            return Problem("weights", f"all its weights are 0: {weights!r}")
        return None

    def answer_list(self, splits: Splits) -> Optional[List[str]]:
        """All answers of the train split, the most frequent first: what may be known before evaluation."""
        answers = (answer.strip() for row in splits.get("train", ()) for answer in row["answer"])
        counts = Counter(answer for answer in answers if answer)
        return sorted(counts, key=lambda answer: (-counts[answer], answer)) or None


class CaptionBuilder(AnnotationBuilder):
    """Images and captions."""

    train_dataset_cls = CaptionTrainData
    eval_dataset_cls = CaptionEvalData
    target = "caption"

    def row_problem(self, row: Annotation, needs_target: bool) -> Optional[Problem]:
        """No caption."""
        captions = row.get("caption") or []
        if not all(has_words(caption) for caption in captions):
            return Problem("empty caption", f"one of its captions is empty: {captions!r}")
        if needs_target and not captions:
            return Problem("no caption", "it has no caption, where other rows have")
        return None

    def arrange(self, split: str, rows: List[Annotation]) -> List[Annotation]:
        """For training one row a caption, as in LAVIS; for evaluation one an image, with all its captions."""
        if split == "train":
            return [{**row, "caption": [caption]} for row in rows for caption in row["caption"]]
        by_image: Dict[Any, Annotation] = {}
        for row in rows:
            merged = by_image.setdefault(row["image_id"], {**row, "caption": []})
            merged["caption"].extend(row.get("caption") or [])
        return list(by_image.values())


def num_images(row: Annotation) -> int:
    """How many images a row has, or how many frames of its video are seen."""
    if row.get("frames"):
        return int(row["frames"])
    return len(row["image"]) if isinstance(row["image"], tuple) else 1


def _collect(problems: List[str], step: Callable[[], Any]) -> Any:
    """Do a step; if it fails, note why and go on."""
    try:
        return step()
    except BadDataError as error:
        problems.extend(error.problems)
        return None


Found = Union[Tuple[str, str], Problem]


def _find_image(row: Annotation, folders: ImageFolders, known: Dict[str, Any]) -> None:
    """Replace the name of a row's image by its path, or note why that cannot be done.

    Rows about the same image share its path: ``known`` has what was found for a name. Of several images all must be
    there; their names together are the row's. A row that is to have none is known by where it was read.
    """
    given = row.get("image")
    if given == ():
        row["image_name"] = row["source"]
        row["image_id"] = row["source"] if row.get("image_id") is None else row["image_id"]
        return
    names = ["" if name is None else str(name).strip() for name in (given if isinstance(given, tuple) else [given])]
    for name in names:
        if name not in known:
            known[name] = _look_up(name, folders)
    found = [known[name] for name in names]
    problem = next((one for one in found if isinstance(one, Problem)), None)
    if problem is not None:
        row["image_name"], row["image_problem"] = " + ".join(names), problem
        return
    paths, called = zip(*found)
    if row.get("frames"):
        told = known.setdefault(f"{names[0]}: header", header_problem(paths[0]))
        if told is not None:
            row["image_problem"] = Problem("bad video", str(told))
    row["image"], row["image_name"] = paths if isinstance(given, tuple) else paths[0], " + ".join(called)
    if row.get("image_id") is None:
        row["image_id"] = row["image_name"]


def _look_up(name: str, folders: ImageFolders) -> Found:
    """An image's path and its name in the folders, or what is wrong."""
    if not name:
        return Problem("no image named", "it names no image")
    try:
        path = folders.find(name)
    except MissingImageError as error:
        return Problem("image not found", str(error))
    except OutsideImageError as error:
        return Problem("image outside its folder", str(error))
    except BadImageError as error:
        return Problem("image name not unique", str(error))
    return path, folders.name_of(path)
