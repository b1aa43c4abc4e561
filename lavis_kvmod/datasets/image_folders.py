"""Find images by the names that annotation files give them, in folders and all their subfolders."""

import os
import re
import unicodedata
from functools import cached_property
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Sequence, Tuple, Union

from lavis_kvmod.datasets.cells import short
from lavis_kvmod.datasets.images import BadImageError
from lavis_kvmod.system.paths import expanded

__all__ = ["IMAGE_SUFFIXES", "ImageFolders", "MissingImageError", "OutsideImageError"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")

_Place = Tuple[str, str]  # a root, and a path below it with "/"
_Table = Dict[str, List[_Place]]
_URL = re.compile(r"^[a-z][a-z0-9+.-]+://", re.IGNORECASE)


class MissingImageError(BadImageError):
    """No image of that name in the folders."""


class OutsideImageError(BadImageError):
    """A relative name that leads out of the folders."""


class ImageFolders:
    """The images under some folders, listed once and not opened.

    Args:
        roots: one folder or several.
        allow_outside: whether a relative name may lead out of them (``../other/a.jpg``).

    Raises:
        FileNotFoundError: for a folder that is not there.
    """

    def __init__(self, roots: Union[str, Path, Sequence[Union[str, Path]]], allow_outside: bool = False):
        self.allow_outside = allow_outside
        roots = [roots] if isinstance(roots, (str, Path)) else list(roots)
        self.roots = list(dict.fromkeys(os.path.abspath(expanded(root)) for root in roots))
        for root in self.roots:
            if not os.path.isdir(root):
                raise FileNotFoundError(f"no folder {root}")
        self._common_root = os.path.commonpath(self.roots) if self.roots else ""
        self._by_name: _Table = {}  # by base name, composed
        self._by_stem: _Table = {}  # by the same without an image's extension
        self._count = 0
        for root in self.roots:
            for below in _files(root):
                self._add(root, below)

    def __len__(self) -> int:
        """How many image files there are."""
        return self._count

    def _add(self, root: str, below: str) -> None:
        base = _base(_composed(below))
        stem, suffix = os.path.splitext(base)
        self._by_name.setdefault(base, []).append((root, below))
        if suffix.lower() in IMAGE_SUFFIXES:
            self._by_stem.setdefault(stem, []).append((root, below))
            self._count += 1

    def find(self, name: str) -> str:
        """The absolute path of an image.

        Args:
            name: an absolute path; a path below a folder or below any of its subfolders; or a bare file name. The
                extension may be left out. A path straight below a folder goes before the same name deeper down. "é" may
                be one character here and two in the file's name, as on a Mac, or the other way round.

        Raises:
            MissingImageError: if there is none, with the file that may be meant.
            OutsideImageError: for a relative name that leads out of the folders.
            BadImageError: if several files fit, naming two.
        """
        name = str(name).strip()
        if os.path.isabs(name):
            if os.path.isfile(name):
                return name
            raise MissingImageError(f"{short(name)}: no such file")
        wanted = _normal(name)
        for table, path_of in ((self._by_name, str), (self._by_stem, _without_suffix)):
            fitting = self._fitting(wanted, table, path_of)
            if len(fitting) > 1:
                raise BadImageError(
                    f"{short(name)}: {len(fitting)} files fit, such as {fitting[0]} and {fitting[1]}; write the path "
                    f"below the folder"
                )
            if fitting:
                return fitting[0]
        for path in (
            os.path.join(root, wanted) for root in self.roots
        ):  # hidden files, and paths that leave the folder
            if wanted and os.path.isfile(path):
                if wanted.startswith("../") and not self.allow_outside:
                    raise OutsideImageError(
                        f"{short(name)}: leads out of the images' folder; write a path below it, or set "
                        "build_info.images.allow_outside: true"
                    )
                return path
        raise MissingImageError(f"{short(name)}: no such image below {', '.join(self.roots)}{self._hint(name)}")

    @staticmethod
    def _fitting(wanted: str, table: _Table, path_of: Callable[[str], str]) -> List[str]:
        """The paths of all that fit (a file below two folders, one of them in the other, counts once)."""
        composed = _composed(wanted)
        places = table.get(_base(composed), [])
        paths = [(place, path_of(_composed(place[1]))) for place in places]
        fitting = [place for place, path in paths if path == composed]
        fitting = fitting or [place for place, path in paths if path.endswith("/" + composed)]
        literal = [place for place in fitting if path_of(place[1]).endswith(wanted)]
        found = literal if len(literal) == 1 else fitting  # two that only their normal form tells apart
        return list(dict.fromkeys(os.path.join(root, *below.split("/")) for root, below in found))

    def _hint(self, name: str) -> str:
        """Which files a name may mean that fits none: with other folders in front, of another case, or ending."""
        base = _base(_composed(_normal(re.split("[?#]", name)[0] if _URL.match(name) else name)))
        stem = _without_suffix(base)
        nearly = self._by_name.get(base) or next(
            filter(None, (self._by_folded.get(key.casefold()) for key in (base, stem))), []
        )
        meant = f"; is {nearly[0][1]} meant?" if nearly else ""
        if len(nearly) > 1:
            meant = f"; is one of {len(nearly)} files meant, such as {nearly[0][1]}?"
        return ("; images are read from folders, not from the net" if _URL.match(name) else "") + meant

    @cached_property
    def _by_folded(self) -> _Table:
        """Images by name and by stem, whatever their case; made for the first name that is not found."""
        folded: _Table = {}
        for stem, places in self._by_stem.items():
            for place in places:
                for key in dict.fromkeys((stem.casefold(), _base(_composed(place[1])).casefold())):
                    folded.setdefault(key, []).append(place)
        return folded

    def name_of(self, path: str) -> str:
        """An image's path below its folder, or below what several folders have in common, with "/": the same on every
        machine. A path that is elsewhere is its own name."""
        if any(path.startswith(root.rstrip(os.sep) + os.sep) for root in self.roots):
            return _composed(os.path.relpath(path, self._common_root).replace(os.sep, "/"))
        return path


def _files(root: str) -> Iterator[str]:
    """The files below a folder, as paths with "/", in a fixed order; links to folders are followed, once."""
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = os.path.relpath(folder, root).replace(os.sep, "/")
        for name in sorted(files):
            if not name.startswith("."):  # such as macOS's "._photo.jpg", which is no image
                yield name if below == "." else f"{below}/{name}"


def _normal(name: str) -> str:
    """``./a//b.jpg`` and, from Windows, ``a\\b.jpg`` as ``a/b.jpg``."""
    return os.path.normpath(name.replace("\\", "/")).replace(os.sep, "/")


def _composed(name: str) -> str:
    """A name with each accent in its letter. A Mac's file names have them apart, what people type has not."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _base(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _without_suffix(path: str) -> str:
    return os.path.splitext(path)[0]
