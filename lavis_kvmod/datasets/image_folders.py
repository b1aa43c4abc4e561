"""Find images by the names that annotation files give them, in folders and all their subfolders."""

import os
from pathlib import Path
from typing import Dict, Iterator, List, Sequence, Tuple, Union

from lavis_kvmod.datasets.images import BadImageError

__all__ = ["IMAGE_SUFFIXES", "ImageFolders", "MissingImageError"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


class MissingImageError(BadImageError):
    """No image of that name in the folders."""


class ImageFolders:
    """The images under some folders, listed once and not opened.

    Args:
        roots: one folder or several.

    Raises:
        FileNotFoundError: for a folder that is not there.
    """

    def __init__(self, roots: Union[str, Path, Sequence[Union[str, Path]]]):
        roots = [roots] if isinstance(roots, (str, Path)) else list(roots)
        self.roots = list(dict.fromkeys(os.path.abspath(os.path.expanduser(str(root))) for root in roots))
        for root in self.roots:
            if not os.path.isdir(root):
                raise FileNotFoundError(f"no folder {root}")
        self._common_root = os.path.commonpath(self.roots) if self.roots else ""
        # Base names, with and without an image's extension, to (root, path below it with "/").
        self._by_name: Dict[str, List[Tuple[str, str]]] = {}
        self._by_stem: Dict[str, List[Tuple[str, str]]] = {}
        self._count = 0
        for root in self.roots:
            for below in _files(root):
                self._add(root, below)

    def __len__(self) -> int:
        """How many image files there are."""
        return self._count

    def _add(self, root: str, below: str) -> None:
        base = below.rsplit("/", 1)[-1]
        stem, suffix = os.path.splitext(base)
        self._by_name.setdefault(base, []).append((root, below))
        if suffix.lower() in IMAGE_SUFFIXES:
            self._by_stem.setdefault(stem, []).append((root, below))
            self._count += 1

    def find(self, name: str) -> str:
        """The absolute path of an image.

        Args:
            name: an absolute path; a path below a folder or below any of its subfolders; or a bare file name. The
                extension may be left out. A path straight below a folder goes before the same name deeper down.

        Raises:
            MissingImageError: if there is none.
            BadImageError: if several files fit, naming two.
        """
        name = str(name).strip()
        if os.path.isabs(name):
            if os.path.isfile(name):
                return name
            raise MissingImageError(f"{name}: no such file")
        wanted = _normal(name)
        for table, path_of in ((self._by_name, str), (self._by_stem, _without_suffix)):
            fitting = self._fitting(wanted, table, path_of)
            if len(fitting) > 1:
                raise BadImageError(
                    f"{name}: {len(fitting)} files fit, such as {fitting[0]} and {fitting[1]}; write the path below "
                    f"the folder"
                )
            if fitting:
                return fitting[0]
        for root in self.roots:  # hidden files, and paths that leave the folder
            if wanted and os.path.isfile(os.path.join(root, wanted)):
                return os.path.join(root, wanted)
        raise MissingImageError(f"{name}: no such image below {', '.join(self.roots)}")

    @staticmethod
    def _fitting(wanted: str, table, path_of) -> List[str]:
        """The paths of all that fit (a file below two folders, one of them in the other, counts once)."""
        places = table.get(wanted.rsplit("/", 1)[-1], [])
        exact = [place for place in places if path_of(place[1]) == wanted]
        fitting = exact or [place for place in places if path_of(place[1]).endswith("/" + wanted)]
        return list(dict.fromkeys(os.path.join(root, *below.split("/")) for root, below in fitting))

    def name_of(self, path: str) -> str:
        """An image's path below its folder, or below what several folders have in common, with "/": the same on every
        machine. A path that is elsewhere is its own name."""
        if any(path.startswith(root.rstrip(os.sep) + os.sep) for root in self.roots):
            return os.path.relpath(path, self._common_root).replace(os.sep, "/")
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


def _without_suffix(path: str) -> str:
    return os.path.splitext(path)[0]
