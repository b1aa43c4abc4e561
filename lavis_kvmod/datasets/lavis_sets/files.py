"""The annotation files and image folders that LAVIS's builders name in ``build_info``, and how to come by them."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, List, Optional, Sequence

from omegaconf import DictConfig
from torch.hub import download_url_to_file

from lavis_kvmod.datasets.bad_samples import BadDataError
from lavis_kvmod.datasets.storage import first_existing, looked_for, places, strings
from lavis_kvmod.weights.files import whole_or_nothing
from lavis_kvmod.weights.finding import WeightFile

__all__ = ["AnnotationFile", "annotation_files", "image_folder_problems"]

Places = Callable[[str], Sequence[Path]]  # see `lavis_kvmod.datasets.storage.places`

_MOVE = "set LAVIS_CACHE_ROOT, or env.cache_root in the run file, to a folder of yours"


@dataclass(frozen=True)
class AnnotationFile:
    """A file of one split, which is fetched where it is missing, as LAVIS does.

    Attributes:
        split: what needs it.
        places: where it is looked for.
        url: where it comes from: a URL, or the path of a copy; None if it has to be there.
        optional: whether one can do without.
    """

    split: str
    places: Sequence[Path]
    url: Optional[str] = None
    optional: bool = False

    @property
    def path(self) -> Path:
        """The first of its places where there is something, else the last, where it belongs."""
        return first_existing(self.places)

    @property
    def is_here(self) -> bool:
        """Whether nothing needs to be fetched."""
        return self.path.is_file()

    def problem(self) -> Optional[str]:
        """Why it cannot be had, or None."""
        if self.is_here or self.optional:
            return None
        key = f"build_info.annotations.{self.split}.storage"
        if WeightFile(self.split, self.url or str(self.path), key).absence():
            source = (
                f", and {self.url} cannot be had; get it elsewhere and put it there," if self.url else "; put it there,"
            )
            return f"{self.split}: no file {looked_for(self.places)}{source} or set {key} to yours"
        folder = next(folder for folder in self.path.parents if folder.exists())
        if not os.access(folder, os.W_OK):
            return f"{self.split}: {self.url} would be put at {self.path}, but {folder} cannot be written to; {_MOVE}"
        return None

    def fetch(self) -> None:
        """Put it where it belongs, whole or not at all.

        Raises:
            BadDataError: if that fails; not for an optional one.
        """
        if self.is_here or (self.optional and not self.url):
            return
        try:
            if self.url and Path(self.url).is_file():
                with whole_or_nothing(self.path) as temporary:
                    shutil.copyfile(self.url, temporary)
            else:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                download_url_to_file(str(self.url), str(self.path))
        except (OSError, ValueError) as error:  # ValueError: no URL at all
            if not self.optional:
                message = f"{self.split}: no file {self.path}, and fetching {self.url} failed ({error})"
                raise BadDataError(f"{message}; put it there, or {_MOVE}") from error


def annotation_files(
    section: DictConfig, optional: Sequence[int] = (), places: Places = places
) -> List[AnnotationFile]:
    """All files under ``build_info.annotations``, split by split, in their order.

    Args:
        section: a data set's section.
        optional: positions, among an evaluated split's files, of those that one can do without.
        places: where a ``storage`` value is looked for; LAVIS's own builders know one place.
    """
    files = []
    for split, info in (section.build_info.get("annotations") or {}).items():
        if info is None:  # a split that one does without
            continue
        storages, urls = strings(info.get("storage")), strings(info.get("url"))
        for i, storage in enumerate(storages):
            url = urls[i] if i < len(urls) else None
            files.append(AnnotationFile(split, places(storage), url, split != "train" and i in optional))
    return files


def image_folder_problems(section: DictConfig, images_from: str = "", places: Places = places) -> List[str]:
    """The folders of images (or videos) that are not there.

    Args:
        images_from: how to get them.
        places: as above.
    """
    key = f"build_info.{section.data_type}.storage"
    roots = strings((section.build_info.get(section.data_type) or {}).get("storage"))
    missing = [looked_for(places(root)) for root in roots if not any(p.exists() for p in places(root))]
    how = f"{images_from}, or " if images_from else ""
    return [f"no folder {path} ({section.data_type}); {how}set {key} to yours" for path in missing]
