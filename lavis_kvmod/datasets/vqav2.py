"""``vqav2``: VQA v2.0 from the files of visualqa.org, trained on train alone, with the leaderboard's file.

LAVIS's ``coco_vqa`` trains on train *and* val by default (``configs/datasets/coco/defaults_vqa.yaml``) and is then
evaluated on val. Here that takes an explicit ``train_on: trainval``, which then has no ``val`` to evaluate on.

Other data sets in the same layout, such as the official OK-VQA and VizWiz files, are read by naming them.
"""

from collections import Counter
from pathlib import Path
from typing import Dict, List, Optional, Set

from omegaconf import DictConfig, OmegaConf

from lavis_kvmod.datasets.annotated import Annotation
from lavis_kvmod.datasets.answer_list import read_answer_list
from lavis_kvmod.datasets.bad_samples import BadDataError
from lavis_kvmod.datasets.builder import Splits
from lavis_kvmod.datasets.image_folders import ImageFolders
from lavis_kvmod.datasets.official import BenchmarkFile, paths_of, read_vqa
from lavis_kvmod.datasets.settings import OfficialSettings
from lavis_kvmod.datasets.storage import stored, strings
from lavis_kvmod.datasets.vqa_benchmark import BenchmarkVQABuilder

__all__ = ["OfficialVQABuilder", "VQAv2Builder"]

# The usual candidates for ranking: answers that are the right one more than 8 times in what is trained on
# (Teney et al., arXiv 1708.02711, section 3).
_CANDIDATE_MIN_COUNT = 9


class OfficialVQABuilder(BenchmarkVQABuilder):
    """What builders over a benchmark's own files share: splits by name, each with its files and an ``images.pattern``,
    an image's path by its id. To implement: `files` and `read`.

    ``train_on: trainval`` adds val to train, for a test-server submission; there is then no split ``val``.
    """

    settings_class = OfficialSettings

    def files(self, split: str, section: DictConfig) -> List[BenchmarkFile]:
        """The files of a split."""
        raise NotImplementedError

    def read(self, paths: List[Path], section: DictConfig) -> List[Annotation]:
        """A split's rows, from its files."""
        raise NotImplementedError

    # ------------------------------------------------------------ which splits

    @classmethod
    def splits_read(cls, section: DictConfig, used: Set[str], ranks: bool = False) -> Set[str]:
        """The splits whose files are needed for a run that uses ``used``."""
        with_val = "train" in used and section.get("train_on") == "trainval"
        return used | {"val"} if with_val else used

    @classmethod
    def splits_given(cls, section: DictConfig) -> List[str]:
        """The splits a run may use."""
        trained_on = {"val"} if section.get("train_on") == "trainval" else set()
        return [split for split in _sections(section) if split not in trained_on]

    # ------------------------------------------------------------ from files to rows

    def annotations(self) -> Splits:
        """All questions of each split, with their answers.

        Raises:
            BadDataError: listing files that are missing (with where to get them), have another layout, or do not
                belong together.
        """
        train_on = self.settings.train_on
        sections = _sections(self.config)
        if train_on == "trainval" and "train" in sections and "val" not in sections:
            raise BadDataError("train_on: trainval, but build_info.annotations has no val")
        problems = [
            f"{split}: build_info.annotations.{split}.images.pattern is not set; set it to the path of an image by its "
            "id, such as val2014/COCO_val2014_{image_id:012d}.jpg"
            for split, section in sections.items()
            if not _pattern(section)
        ]
        if problems:
            raise BadDataError(problems)
        files = {split: self.files(split, section) for split, section in sections.items()}
        paths_of([file for of_split in files.values() for file in of_split])  # tells all that are missing
        problems, splits = [], {}
        for split, section in sections.items():
            try:
                splits[split] = self.read(paths_of(files[split]), section)
            except BadDataError as error:
                problems += [f"{split}: {problem}" for problem in error.problems]
        if problems:
            raise BadDataError(problems)
        if train_on == "trainval" and "train" in splits:
            splits["train"] = splits["train"] + splits.pop("val")
        return splits

    def image_folders(self) -> Optional[ImageFolders]:
        """The images' folder, checked to have the folder of each split.

        Raises:
            BadDataError: listing folders that are missing, and where to get them.
        """
        roots = [stored(root) for root in strings(self.config.build_info.images.storage)]
        problems = []
        for split, section in _sections(self.config).items():
            below = _pattern(section).rpartition("/")[0]
            if "{" not in below and not any((root / below).is_dir() for root in roots):
                looked = " or ".join(str(root / below) for root in roots)
                url = (section.get("images") or {}).get("url")
                get = f"get {url}, unpack it there, or " if url else ""
                problems.append(f"{split}: no folder {looked} (images); {get}set build_info.images.storage to yours")
        if problems:
            raise BadDataError(problems)
        return super().image_folders()

    def answer_list(self, splits: Splits) -> Optional[List[str]]:
        """The candidates for ranking: from ``build_info.answer_list`` if that file is there, else the answers that are
        the most given one more than 8 times in train, the most frequent first."""
        entry = self.config.build_info.get("answer_list")
        file = entry and BenchmarkFile.from_config("answer list", "build_info.answer_list", entry)
        if file and file.problem() is None:
            return read_answer_list(str(file.storage))
        counts: Dict[str, int] = Counter(Counter(row["answer"]).most_common(1)[0][0] for row in splits.get("train", ()))
        frequent = [answer for answer, count in counts.items() if count >= _CANDIDATE_MIN_COUNT and answer.strip()]
        return sorted(frequent, key=lambda answer: (-counts[answer], answer)) or None


def _sections(config: DictConfig) -> Dict[str, DictConfig]:
    """What a data set's section says of each split; one that is null is not there."""
    given = config.build_info.annotations
    return {split: section for split, section in given.items() if section is not None}


def _pattern(section: DictConfig) -> str:
    """What a split's section says of its images' paths; '' for nothing."""
    return str(OmegaConf.select(section, "images.pattern") or "") if OmegaConf.is_dict(section) else ""


class VQAv2Builder(OfficialVQABuilder):
    """``vqav2``: questions about COCO's photographs, from the published files.

    A split is a file of ``questions`` and one of ``annotations``, left out where the answers are not published.
    """

    benchmark = "vqav2"
    DATASET_CONFIG_DICT = {"default": "configs/datasets/vqav2/defaults.yaml"}

    def files(self, split: str, section: DictConfig) -> List[BenchmarkFile]:
        """The questions, and the annotations if there are any."""
        key = f"build_info.annotations.{split}"
        given = ["questions"] if section.get("annotations") is None else ["questions", "annotations"]
        return [BenchmarkFile.from_config(f"{split}, {name}", f"{key}.{name}", section.get(name)) for name in given]

    def read(self, paths: List[Path], section: DictConfig) -> List[Annotation]:
        """See `read_vqa`."""
        questions, *annotations = paths
        return read_vqa(questions, annotations[0] if annotations else None, section.images.pattern)
