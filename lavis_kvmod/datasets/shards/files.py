"""Which shards there are, and what is known of them without reading them.

``shards.json``, which ``lavis-kvmod pack`` leaves beside the shards, is their index: how many samples each holds, its
size and its SHA-256. With it an epoch's length is known, and a shard that is missing or cut short is told at once.
"""

import glob
import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence

import braceexpand

from lavis_kvmod.datasets.bad_samples import BadDataError, some_of
from lavis_kvmod.datasets.shards.rows import Kind, ends_as_a_tar
from lavis_kvmod.datasets.storage import looked_for, places

__all__ = [
    "ANSWERS",
    "Contents",
    "Damage",
    "INDEX",
    "Shard",
    "damage_of",
    "find_shards",
    "index_text",
    "read_answers",
    "read_index",
]

INDEX, ANSWERS = "shards.json", "answers.json"
_INDEX_VERSION = 1
_URL_SCHEMES = ("http:", "https:", "s3:", "gs:", "hf:", "pipe:", "ftp:", "sftp:", "hdfs:")


class Contents(NamedTuple):
    """What a shard holds.

    Attributes:
        images: samples, that is images.
        texts: questions, or captions.
        targets: of these, how many have an answer (or, if captions, are not empty).
        first_key, last_key: in the order of text, not of the shard.
        bytes, sha256: of the file.
    """

    images: int
    texts: int
    targets: int
    first_key: str = ""
    last_key: str = ""
    bytes: int = 0
    sha256: str = ""


class Shard(NamedTuple):
    """A tar file, and what its index says of it, if it has one."""

    path: Path
    contents: Optional[Contents] = None

    @property
    def counted(self) -> Contents:
        """What it holds, where that is known.

        Raises:
            ValueError: where it is not.
        """
        if self.contents is None:
            raise ValueError(f"{self.path}: expected a shard that has been counted")
        return self.contents


def find_shards(patterns: Sequence[str], kind: Optional[Kind] = None) -> List[Shard]:
    """The shards that are meant, in the order given; what a glob or a folder gives, sorted by name.

    Args:
        patterns: each a path, a folder (its ``*.tar``), a glob, or a list in braces such as
            ``train-{000000..000099}.tar``. Relative to where the user stands, else to LAVIS's ``cache_root``.
        kind: what they should hold, where an index tells.

    Raises:
        BadDataError: listing the patterns that match nothing, the files that are missing or given twice, and what is
            wrong with indices.
    """
    paths: Dict[Path, None] = {}
    globs: List[str] = []
    problems: List[str] = []
    missing: List[str] = []
    for pattern in patterns:
        if pattern.startswith(_URL_SCHEMES):
            problems.append(f"{pattern}: expected a path on this machine; download the shards, or mount where they are")
            continue
        try:
            names = list(braceexpand.braceexpand(pattern))
        except ValueError:  # braceexpand's UnbalancedBracesError is one
            problems.append(f"{pattern}: a brace without its other half; expected a list such as {{000..099}}")
            continue
        for expanded in names:
            looked = _places(expanded)
            place, found = next(((place, found) for place in looked for found in [_files(place)] if found), ("", []))
            if not found:
                missing.append(f"{expanded} (looked for {looked_for(looked, ' and ')})")
            globs.append(place)
            for path in found:
                if path in paths:
                    problems.append(f"{path}: given twice; a shard may be in a split once")
                paths[path] = None
    if missing:
        problems.append(f"no shards found under {len(missing)} of the names given{some_of(missing)}")
    indices: Dict[Path, Dict[str, Any]] = {}
    for folder in dict.fromkeys(path.parent for path in paths):
        try:
            indices[folder] = read_index(folder) or {}
            problems += _index_problems(folder, indices[folder], kind, globs)
        except BadDataError as error:
            problems += error.problems
    if problems:
        raise BadDataError(problems)
    return [Shard(path, indices[path.parent].get("shards", {}).get(path.name)) for path in paths]


def _places(pattern: str) -> List[str]:
    """Where to look; a folder means all its shards."""
    return [str(place / "*.tar" if place.is_dir() else place) for place in places(pattern)]


def _files(place: str) -> List[Path]:
    if Path(place).is_file():  # also where its name has brackets
        return [Path(place)]
    return [Path(name) for name in sorted(glob.glob(place)) if Path(name).is_file()]


def read_index(folder: Path) -> Optional[Dict[str, Any]]:
    """A folder's ``shards.json``, with `Contents` by file name under ``shards``; None if there is none.

    Raises:
        BadDataError: if it cannot be read.
    """
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["version"] != _INDEX_VERSION:
            raise ValueError(f"its version is {index['version']}, expected {_INDEX_VERSION}")
        names = [entry["name"] for entry in index["shards"]]
        contents = [Contents(**{key: entry[key] for key in Contents._fields}) for entry in index["shards"]]
        return {**index, "shards": dict(zip(names, contents))}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadDataError(
            f"{path}: expected the index that lavis-kvmod pack writes, got one that cannot be read "
            f"({type(error).__name__}: {error}); pack again, or remove it"
        ) from error


def _index_problems(folder: Path, index: Dict[str, Any], kind: Optional[Kind], globs: Sequence[str]) -> List[str]:
    """An index that says that something is wrong, though the files found do not."""
    if not index:
        return []
    if not index.get("complete"):
        return [f"{folder}: lavis-kvmod pack has not finished here; run it again, and it goes on where it stopped"]
    if kind is not None and index["kind"] != kind.name:
        return [f"{folder}: its shards hold {index['kind']} data; use the builder wds_{index['kind']}"]
    # A glob does not know what it does not find.
    meant = [folder / name for name in index["shards"] if any(fnmatch(str(folder / name), place) for place in globs)]
    lost = [str(path) for path in meant if not path.is_file()]
    if lost:
        return [f"{len(lost)} shards of {folder / INDEX} are not there; put them back, or pack again{some_of(lost)}"]
    return []


class Damage(NamedTuple):
    """Why a shard is not whole; whether what is left of it is what was there before."""

    text: str
    is_cut_short: bool


def damage_of(shard: Shard) -> Optional[Damage]:
    """Why a shard cannot be whole, told by its size and its end alone; None if it may be."""
    size = shard.path.stat().st_size
    if shard.contents is not None:
        expected = shard.contents.bytes
        if size == expected:
            return None
        is_cut_short = size < expected
        what = "cut short" if is_cut_short else "changed"
        return Damage(f"{shard.path}: {what}: expected {expected} bytes ({INDEX} beside it), got {size}", is_cut_short)
    if ends_as_a_tar(shard.path):
        return None
    return Damage(f"{shard.path}: cut short: its {size} bytes do not end as a tar does", True)


def read_answers(folder: Path) -> List[str]:
    """The answers to choose from, if the folder has a list of them.

    Raises:
        BadDataError: if it cannot be read.
    """
    path = folder / ANSWERS
    if not path.is_file():
        return []
    try:
        answers = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadDataError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise BadDataError(f"{path}: expected a list of texts, the answers to choose from")
    return answers


def index_text(kind: Kind, shards: Iterable[Shard], *, complete: bool, **more: Any) -> str:
    """The contents of a ``shards.json``."""
    entries = [{"name": shard.path.name, **shard.contents._asdict()} for shard in shards if shard.contents]
    index = {"version": _INDEX_VERSION, "kind": kind.name, "complete": complete, **more, "shards": entries}
    return json.dumps(index, indent=1, ensure_ascii=False) + "\n"
