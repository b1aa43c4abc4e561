"""What our readers of LAVIS's benchmark files share."""

from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from omegaconf import DictConfig

from lavis_kvmod.datasets.annotated import Annotation
from lavis_kvmod.datasets.bad_samples import BadDataError
from lavis_kvmod.datasets.builder import AnnotationBuilder, Splits
from lavis_kvmod.datasets.image_folders import ImageFolders
from lavis_kvmod.datasets.lavis_sets.files import annotation_files, image_folder_problems
from lavis_kvmod.datasets.official import read_json

__all__ = ["COCO_IMAGES", "LavisFilesBuilder", "SPLITS", "VG_IMAGES", "read_rows", "rows_in"]

COCO_IMAGES = (
    "get train2014.zip, val2014.zip and test2015.zip of http://images.cocodataset.org/zips/, unpack them there"
)
VG_IMAGES = (
    "get images.zip and images2.zip of https://homes.cs.washington.edu/~ranjay/visualgenome/api.html, unpack them there"
)

SPLITS = ("train", "val", "test")  # what LAVIS's builders build


class LavisFilesBuilder(AnnotationBuilder):
    """Reads ``build_info.annotations.<split>.storage``, one file or several, as LAVIS does."""

    optional_files: Sequence[int] = ()  # see `annotation_files`

    @classmethod
    def splits_given(cls, section: DictConfig) -> List[str]:
        """The splits a run may use."""
        return [split for split, info in section.build_info.annotations.items() if split in SPLITS and info is not None]

    @classmethod
    def config_problems(cls, section: DictConfig) -> List[str]:
        """Files that are not there and not to be had; once all are there, what is wrong in them too."""
        files = annotation_files(section, cls.optional_files)
        problems = [problem for file in files for problem in [file.problem()] if problem]
        problems += image_folder_problems(section, cls.images_from)
        if problems or not all(file.is_here or file.optional for file in files):
            return problems
        return super().config_problems(section)

    def _download_data(self) -> None:
        for file in annotation_files(self.config, self.optional_files):
            file.fetch()

    def annotations(self) -> Splits:
        """The rows of each split.

        Raises:
            BadDataError: listing files that are missing or not what they should be.
        """
        by_split: Dict[str, List[Path]] = {split: [] for split in self.splits_given(self.config)}
        for file in annotation_files(self.config, self.optional_files):
            if file.split in by_split:
                by_split[file.split].append(file.path)
        problems, splits = [], {}
        for split, paths in by_split.items():
            try:
                splits[split] = self.read(split, paths)
            except BadDataError as error:
                problems += [f"{split}: {problem}" for problem in error.problems]
        if problems:
            raise BadDataError(problems)
        return splits

    def read(self, split: str, paths: List[Path]) -> List[Annotation]:
        """The rows of a split, from its files.

        Raises:
            BadDataError: for files that are not what they should be.
        """
        raise NotImplementedError

    def image_folders(self) -> Optional[ImageFolders]:
        """As for any annotations; where there are none, with how to get them."""
        problems = image_folder_problems(self.config, self.images_from)
        if problems:
            raise BadDataError(problems)
        return super().image_folders()


def read_rows(path: Path) -> List[Annotation]:
    """The rows of a file of LAVIS's: a JSON list of objects."""
    return rows_in(read_json(path), path)


def rows_in(rows: Any, path: Path) -> List[Annotation]:
    """`read_rows`, of what has been read from ``path``."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise BadDataError(f"{path}: expected a list of objects, [{{…}}, …]")
    return [{**row, "source": f"{path.name}, row {number}"} for number, row in enumerate(rows)]
