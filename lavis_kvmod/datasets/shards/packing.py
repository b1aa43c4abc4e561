"""Write a data set as shards: the image files' own bytes, once each, beside a JSON list of what is asked or said.

What is written depends on the data set and the settings alone, to the byte. So a packing that was interrupted goes on
after its last whole shard, and ends with the same files as one that was not.
"""

import hashlib
import io
import json
import logging
import os
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import webdataset
from filelock import FileLock, Timeout
from PIL import Image

from lavis_kvmod.datasets.bad_samples import BadDataError, BadSamplePolicy, some_of
from lavis_kvmod.datasets.cells import said
from lavis_kvmod.datasets.images import BadImageError, format_of, read_image
from lavis_kvmod.datasets.seeding import stable_hash
from lavis_kvmod.datasets.shards.files import ANSWERS, INDEX, Contents, Shard, index_text, read_index
from lavis_kvmod.datasets.shards.rows import CAPTION, IMAGE_EXTENSIONS, VQA, Kind
from lavis_kvmod.system.progress import Progress
from lavis_kvmod.system.quiet import WarningTally, gathered_warnings
from lavis_kvmod.weights.files import sha256, whole_or_nothing

__all__ = ["Item", "PackSettings", "Packer", "items_of", "readable"]

_COPIED = ("image_id", "question_id", "question", "question_type", "answer_type", "weight")

Entry = Dict[str, Any]


@dataclass(frozen=True)
class PackSettings:
    """What shapes the shards.

    Attributes:
        name: what the shards' file names start with, such as the split's name.
        prefix: what the keys start with; other data sets' keys should start with something else.
        max_count: images in a shard.
        max_bytes: a shard is closed when its images and texts are more.
        seed: of the order in which images are packed, since a reader shuffles what is near only; None keeps theirs.
    """

    name: str
    prefix: str
    max_count: int = 10_000
    max_bytes: int = 1_000_000_000
    seed: Optional[int] = 42

    def __post_init__(self) -> None:
        for key in ("name", "prefix"):
            value = getattr(self, key)
            if not value or set(value) & set("./\\") or value.startswith("_"):
                raise ValueError(f"{key}: expected a name without dots, slashes or a leading _, got {value!r}")
        for key in ("max_count", "max_bytes"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: expected a number above 0, got {getattr(self, key)}")


@dataclass(frozen=True)
class Item:
    """An image, and the annotations that belong to it.

    Attributes:
        name: of the image, for messages.
        entries: what its JSON will hold.
        path: of its file.
        picture: in place of a file, what gives a PIL image.
        stamp: what tells that it is still the same: for a file its size and time of change.
    """

    name: str
    entries: List[Entry] = field(default_factory=list)
    path: Optional[str] = None
    picture: Any = None
    stamp: Tuple[int, ...] = ()

    def read(self) -> Tuple[str, bytes]:
        """The image's extension and bytes: the file's own, or a PNG of the picture.

        Raises:
            BadDataError: if the file has changed since the item was made.
        """
        if self.path is None:
            file = io.BytesIO()
            self.picture().save(file, "png")
            return "png", file.getvalue()
        data = Path(self.path).read_bytes()
        if _stamp(self.path) != self.stamp or len(data) != self.stamp[0]:
            raise BadDataError(f"{self.path}: changed while it was being packed; start again")
        return _extension(self.path, data), data


def _stamp(path: str) -> Tuple[int, ...]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _extension(path: str, data: bytes) -> str:
    extension = os.path.splitext(path)[1].lower().lstrip(".")
    if extension in IMAGE_EXTENSIONS:
        return extension
    try:
        extension = {"JPEG": "jpg"}.get(format_of(data), format_of(data).lower())
    except BadImageError as error:
        raise BadDataError(f"{path}: {error}") from error
    if extension not in IMAGE_EXTENSIONS:
        raise BadDataError(f"{path}: expected one of the formats {', '.join(IMAGE_EXTENSIONS)}; got {extension}")
    return extension


def items_of(dataset: Any, name: str) -> Tuple[Kind, List[Item]]:
    """What there is to pack: a data set's images in the order they first come, each with all its annotations.

    Args:
        dataset: any with LAVIS's ``annotation``: a list of dicts with ``image`` (a path, below ``vis_root`` if it is
            relative), or with a ``picture(annotation)`` that gives a PIL image.
        name: of data set and split, for messages.

    Raises:
        BadDataError: listing images that are missing, or annotations that could not be read again.
    """
    annotations = getattr(dataset, "annotation", None)
    if not annotations:
        raise BadDataError(
            f"{name}: expected a data set with a list of annotations, got {type(dataset).__name__} without"
        )
    kind = VQA if "question" in annotations[0] else CAPTION
    entries = [_entry(annotation, kind, f"{name}, row {i}") for i, annotation in enumerate(annotations)]
    has_targets = any(entry.get(kind.target) for entry in entries)
    items: Dict[Any, Item] = {}
    problems, missing = [], {}
    for annotation, entry in zip(annotations, entries):
        try:
            json.dumps(entry)
            kind.parse(entry, None)
            if has_targets and not entry.get(kind.target):
                raise ValueError(f"it has no {kind.target}, where others have")
            if not annotation.get("image") and not hasattr(dataset, "picture"):
                raise ValueError(f"it names no image; it has {', '.join(annotation)}")
            if annotation.get("frames"):
                raise ValueError("a shard's sample has one image; this row has a video")
            if isinstance(annotation.get("image"), tuple):
                raise ValueError(f"a shard's sample has one image; this row has {len(annotation['image'])}")
        except (ValueError, TypeError) as error:
            problems.append(f"{entry['source']}: {error}")
            continue
        if hasattr(dataset, "picture"):
            item = items.setdefault(
                entry["image_id"], Item(str(entry["image_id"]), picture=_Picture(dataset, annotation))
            )
        else:
            path = os.path.join(getattr(dataset, "vis_root", None) or "", str(annotation["image"]))
            if path not in items and path not in missing:
                try:
                    items[path] = Item(entry["image"], path=path, stamp=_stamp(path))
                except OSError as error:
                    missing[path] = f"{entry['source']}: {path}: {error.strerror}"
            if path in missing:
                continue
            item = items[path]
        item.entries.append(entry)
    found = []
    if missing:
        total, lines = len(missing) + len(items), list(missing.values())
        found.append(f"{name}: {len(missing)} of {total} images cannot be had{some_of(lines)}")
    if problems:
        found.append(f"{name}: {len(problems)} of {len(entries)} annotations cannot be packed{some_of(problems)}")
    if found:
        raise BadDataError(found)
    return kind, list(items.values())


class _Picture(NamedTuple):
    dataset: Any
    annotation: Dict[str, Any]

    def __call__(self) -> Image.Image:
        return self.dataset.picture(self.annotation)


def _entry(annotation: Dict[str, Any], kind: Kind, source: str) -> Entry:
    """What is kept of an annotation."""
    entry = {key: _plain(annotation[key]) for key in _COPIED if annotation.get(key) is not None}
    if "image" in annotation:
        entry["image"] = str(annotation.get("image_name") or annotation["image"])
        if os.path.isabs(entry["image"]):  # says nothing on another machine
            entry["image"] = os.path.basename(entry["image"])
    image_id = annotation.get("image_id", annotation.get("img_id"))
    entry["image_id"] = entry.get("image") if image_id is None else _plain(image_id)
    found = said(annotation, kind.target)
    if found:
        entry[kind.target] = [found] if isinstance(found, str) else [_text(text, kind) for text in found]
    entry["source"] = str(annotation.get("source") or source)
    return entry


def _text(value: Any, kind: Kind) -> str:
    return str(value[kind.target] if isinstance(value, dict) and kind.target in value else value)


def _plain(value: Any) -> Any:
    """NumPy's and PyTorch's numbers as JSON can hold them."""
    return value.tolist() if hasattr(value, "tolist") else value


def readable(items: Sequence[Item], policy: BadSamplePolicy, name: str) -> List[Item]:
    """The items whose image can be decoded: all of them are opened.

    Raises:
        BadDataError: for those that cannot, as ``policy`` says.
    """
    good, problems, tally = [], [], WarningTally()
    for item in Progress(items, f"{name}: decoding images", log_every=1000):
        try:
            with gathered_warnings() as gathered:
                read_image(item.read()[1], name=item.path or item.name)
            tally.tell(gathered)
            good.append(item)
        except (BadImageError, BadDataError) as error:
            problems.append(f"{item.entries[0]['source']}: {error}")
    policy.judge(problems, len(items), f"images of {name}")
    return good


class Packer:
    """Writes one split's shards into a folder of their own, with their index (``shards.json``).

    Args:
        folder: new, empty, or left by a packing of the same that did not end.
        kind, items: see `items_of`.
        settings: see there.
        answers: the answers to choose from, for tasks that rank them.
    """

    def __init__(
        self,
        folder: Path,
        kind: Kind,
        items: Sequence[Item],
        settings: PackSettings,
        answers: Optional[Sequence[str]] = None,
    ):
        self.folder = Path(folder)
        self._kind = kind
        self._items = list(items)
        if settings.seed is not None:
            random.Random(stable_hash(settings.seed, "pack")).shuffle(self._items)
        self._settings = settings
        self._answers = list(answers or [])
        self._made_from: Dict[str, Any] = {"settings": asdict(settings), "source": self._source()}

    def _source(self) -> str:
        """A sum over everything that is packed; of the images by size and time, as reading them takes as long as
        packing them."""
        digest = hashlib.sha256()
        for item in self._items:
            digest.update(json.dumps([item.name, item.stamp, item.entries]).encode() + b"\n")
        digest.update(json.dumps(self._answers).encode())
        return digest.hexdigest()

    def pack(self) -> List[Shard]:
        """Write what is not there yet, and return all shards.

        Raises:
            BadDataError: if the folder holds something else, or shards of other data or settings; or another process
                is packing there.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(str(self.folder / ".lock"), timeout=0):
                return self._pack()
        except Timeout:
            raise BadDataError(f"{self.folder}: another lavis-kvmod pack is writing here") from None

    def _pack(self) -> List[Shard]:
        shards = self._finished()
        self._write_index(shards, complete=False)
        done = sum(shard.contents.images for shard in shards if shard.contents)
        if shards:
            logging.info("%s: going on after %d whole shards (%d images)", self.folder, len(shards), done)
        left = Progress(self._items[done:], f"packing {self._settings.name}", log_every=1000)
        coming = iter(enumerate(left, start=done))
        pair = next(coming, None)
        while pair is not None:
            path = self.folder / f"{self._settings.name}-{len(shards):06d}.tar"
            contents, pair = self._write_shard(path, pair, coming)
            shards.append(Shard(path, contents._replace(bytes=path.stat().st_size, sha256=sha256(path))))
            self._write_index(shards, complete=False)
        if self._answers:
            with whole_or_nothing(self.folder / ANSWERS) as temporary:
                temporary.write_text(json.dumps(self._answers, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
        self._write_index(shards, complete=True)
        return shards

    def _write_shard(
        self, path: Path, pair: Optional[Tuple[int, Item]], coming: Iterator[Tuple[int, Item]]
    ) -> Tuple[Contents, Optional[Tuple[int, Item]]]:
        """Write one shard, and return what it holds and the pair after it."""
        keys: List[str] = []
        texts = targets = size = 0
        with whole_or_nothing(path) as temporary, open(temporary, "wb") as file:
            with webdataset.TarWriter(file, mtime=0) as tar:
                while pair is not None and len(keys) < self._settings.max_count and size < self._settings.max_bytes:
                    number, item = pair
                    extension, image = item.read()
                    keys.append(f"{self._settings.prefix}-{number:08d}")
                    sample = {"__key__": keys[-1], extension: image, "json": json.dumps(item.entries).encode()}
                    size += tar.write(sample)
                    for entry in item.entries:
                        count = len(entry.get(self._kind.target, ())) if self._kind == CAPTION else 1
                        texts += max(1, count)
                        targets += count if entry.get(self._kind.target) else 0
                    pair = next(coming, None)
        return Contents(len(keys), texts, targets, keys[0], keys[-1]), pair

    def _finished(self) -> List[Shard]:
        """The whole shards that an earlier call has left."""
        for left_over in self.folder.glob(".*.tmp"):  # by a call that was killed; the lock says that none is running
            left_over.unlink()
        index = read_index(self.folder)
        if index is None:
            strangers = sorted(path.name for path in self.folder.iterdir() if path.name != ".lock")
            if strangers:
                raise BadDataError(f"{self.folder}: expected a new or empty folder, got one that holds {strangers[0]}")
            return []
        self._check_same(index)
        shards: List[Shard] = []
        found = [Shard(self.folder / name, contents) for name, contents in index["shards"].items()]
        for shard in Progress(found, f"checking {self._settings.name}", log_every=10):
            path, contents = shard
            if not path.is_file() or path.stat().st_size != contents.bytes or sha256(path) != contents.sha256:
                logging.warning("%s is missing or damaged: it and what follows is packed anew", path)
                break
            shards.append(shard)
        return shards

    def _check_same(self, index: Dict[str, Any]) -> None:
        before = index.get("made_from")
        if before is None:
            raise BadDataError(f"{self.folder / INDEX}: not of lavis-kvmod pack --cfg-path; choose another folder")
        old, new = before["settings"], self._made_from["settings"]
        differing = [f"{key} was {old.get(key)!r} and is {new[key]!r}" for key in new if old.get(key) != new[key]]
        if before["source"] != self._made_from["source"] and not differing:
            differing = ["images or annotations have changed"]
        if differing:
            raise BadDataError(
                f"{self.folder}: packed from something else before ({'; '.join(differing)}); remove the folder to pack "
                "anew, or choose another"
            )

    def _write_index(self, shards: Sequence[Shard], complete: bool) -> None:
        with whole_or_nothing(self.folder / INDEX) as temporary:
            text = index_text(self._kind, shards, complete=complete, made_from=self._made_from)
            temporary.write_text(text, encoding="utf-8")
