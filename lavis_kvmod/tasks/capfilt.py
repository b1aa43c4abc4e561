"""CapFilt (BLIP, arXiv 2201.12086, section 3.3): of the texts that an image has, and those that a captioner writes for
it, a filter keeps what fits.

Images are gone through in blocks. A block's result is a file of its own, written whole or not at all and decided by the
block's images and the settings alone: a call that was interrupted goes on with what is missing, on any number of ranks.
"""

import io
import json
import logging
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from lavis.processors.blip_processors import BlipCaptionProcessor, BlipImageEvalProcessor
from PIL import Image

from lavis_kvmod.datasets.bad_samples import BadDataError
from lavis_kvmod.datasets.cells import has_words
from lavis_kvmod.datasets.images import BadImageError, read_image
from lavis_kvmod.datasets.seeding import stable_hash
from lavis_kvmod.datasets.shards.packing import Item
from lavis_kvmod.datasets.shards.rows import CAPTION, rows_by_sample
from lavis_kvmod.models.objectives import similarity
from lavis_kvmod.system.text_cleaning import one_line
from lavis_kvmod.weights.files import whole_or_nothing

__all__ = ["CapFilt", "CapFiltSettings", "begin", "blocks_of", "merge", "named", "rows_of", "shard_items"]

ABOUT, KEPT, DROPPED, PARTS, IMAGES = "about.json", "kept.jsonl", "dropped.jsonl", "parts", "images"
GIVEN, WRITTEN = "data", "captioner"

Row = Dict[str, Any]


class CapFiltSettings(NamedTuple):
    """What decides the result, beside images and models.

    Attributes:
        captions: how many the captioner writes for an image.
        itm: least probability of the matching head that it is a pair; 0 does not ask it.
        itc: least cosine of image and text, the query that fits best; -1 keeps all.
        top_p, max_len, min_len: of the captioner's nucleus sampling.
        block: images in a block.
        seed: of the sampling.
    """

    captions: int = 1
    itm: float = 0.5
    itc: float = -1.0
    top_p: float = 0.9
    max_len: int = 30
    min_len: int = 1
    block: int = 64
    seed: int = 42


class Text(NamedTuple):
    """Of an image: a text, and where it comes from."""

    text: str
    source: str


class CapFilt:
    """Writes, judges and sorts the texts of a block of images.

    Args:
        judge: a stage-1 model.
        captioner: `blip2_opt_kvmod`; None judges the given texts alone.
        settings: see there.
        folder: where the results go.
    """

    def __init__(self, judge: Any, captioner: Optional[Any], settings: CapFiltSettings, folder: Path):
        self._judge, self._captioner = judge, captioner
        self._settings, self._folder = settings, folder
        self._clean: Callable[[str], str] = BlipCaptionProcessor(max_words=1000)

    def run(self, blocks: Iterable[Tuple[int, Sequence[Item]]], rank: int = 0, world_size: int = 1) -> None:
        """Work on this rank's blocks, as far as they have no result yet."""
        for number, items in blocks:
            path = part_of(self._folder, number)
            if number % world_size != rank or path.exists():
                continue
            rows = self._block(number, items)
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_or_nothing(path) as temporary:
                temporary.write_text("".join(map(as_line, rows)), encoding="utf-8")

    @torch.no_grad()
    def _block(self, number: int, items: Sequence[Item]) -> List[Row]:
        """The rows of a block, kept ones and dropped ones (those have a ``reason``), in the images' order."""
        rows: List[List[Row]] = [[] for _ in items]
        pictures: Dict[int, Image.Image] = {}
        for i, item in enumerate(items):
            try:
                pictures[i] = read_image(item.read()[1], name=item.path or item.name).convert("RGB")
            except (BadImageError, BadDataError, OSError) as error:
                rows[i].append({**named(item), "reason": f"image cannot be read: {error}"})
        texts = {i: _given(items[i]) for i in pictures}
        if self._captioner is not None and pictures:
            torch.manual_seed(stable_hash(self._settings.seed, number))
            for i, written in zip(pictures, self._write(list(pictures.values()))):
                texts[i] += [Text(one_line(text), WRITTEN) for text in written]
        for i, judged in zip(pictures, self._judged(list(pictures.values()), [_distinct(texts[i]) for i in pictures])):
            name = named(items[i])
            if any("reason" not in row for row in judged) and items[i].path is None:
                name["image"] = self._save(items[i])
            rows[i] += [{**name, **row} for row in judged]
        return [row for of_image in rows for row in of_image]

    def _write(self, pictures: Sequence[Image.Image]) -> List[List[str]]:
        """So many captions for each picture."""
        settings, model = self._settings, self._captioner
        if model is None:
            return []
        captions = model.generate(
            {"image": _pixels(model, pictures)},
            use_nucleus_sampling=True,
            top_p=settings.top_p,
            max_length=settings.max_len,
            min_length=settings.min_len,
            num_captions=settings.captions,
        )
        return [list(captions[i : i + settings.captions]) for i in range(0, len(captions), settings.captions)]

    def _judged(self, pictures: Sequence[Image.Image], texts: Sequence[Sequence[Text]]) -> List[List[Row]]:
        """Each picture's texts with their scores, and a ``reason`` where they do not fit."""
        pairs = [(i, one) for i, of_image in enumerate(texts) for one in of_image if has_words(one.text)]
        rows: List[List[Row]] = [
            [{**_row(one), "reason": "no words"} for one in of_image if not has_words(one.text)] for of_image in texts
        ]
        if not pairs:
            return rows
        model = self._judge
        features = model.features({"image": _pixels(model, pictures)})
        images = model.image_features(features)
        for start in range(0, len(pairs), 256):
            some = pairs[start : start + 256]
            places = torch.tensor([i for i, _ in some], device=images.device)
            tokens = model.tokenise([self._clean(one.text) for _, one in some])
            similar = similarity(images, model.text_features(tokens))
            fits = similar[places, torch.arange(len(some), device=places.device)]
            scores: Dict[str, List[float]] = {"itc": fits.float().tolist()}
            if self._settings.itm > 0:
                shown = type(features)(*(None if part is None else part[places] for part in features))
                scores["itm"] = model.match(shown, tokens).float().softmax(dim=-1)[:, 1].tolist()
            for k, (i, one) in enumerate(some):
                got = {name: round(values[k], 4) for name, values in scores.items()}
                low = [f"{n} {got[n]} is below {least}" for n, least in self._least() if n in got and got[n] < least]
                rows[i].append({**_row(one), **got, **({"reason": "; ".join(low)} if low else {})})
        return rows

    def _least(self) -> List[Tuple[str, float]]:
        return [("itm", self._settings.itm), ("itc", self._settings.itc)]

    def _save(self, item: Item) -> str:
        """An image that has no file of its own, into the results' folder; returns its name there."""
        extension, data = item.read()
        name = f"{item.name.replace('/', '_')}.{extension}"
        (self._folder / IMAGES).mkdir(parents=True, exist_ok=True)
        with whole_or_nothing(self._folder / IMAGES / name) as temporary:
            temporary.write_bytes(data)
        return name


def _pixels(model: Any, pictures: Sequence[Image.Image]) -> torch.Tensor:
    processor = BlipImageEvalProcessor(image_size=model.image_size)
    return torch.stack([processor(picture) for picture in pictures]).to(model.device)


def named(item: Item) -> Row:
    """What a table calls an image."""
    entry = item.entries[0]
    return {"image": str(entry.get("image") or item.name), "image_id": entry.get("image_id", item.name)}


def _given(item: Item) -> List[Text]:
    return [Text(one_line(text), GIVEN) for entry in item.entries for text in entry.get("caption") or ()]


def _row(text: Text) -> Row:
    return {"caption": text.text, "text_from": text.source}


def _distinct(texts: Sequence[Text]) -> List[Text]:
    """Each text once; what the data say already is not the captioner's."""
    first: Dict[str, Text] = {}
    for one in texts:
        first.setdefault(one.text, one)
    return list(first.values())


def blocks_of(items: Iterable[Item], size: int) -> Iterator[Tuple[int, List[Item]]]:
    """Numbered blocks of images."""
    block: List[Item] = []
    number = 0
    for item in items:
        block.append(item)
        if len(block) == size:
            yield number, block
            number, block = number + 1, []
    if block:
        yield number, block


class _InShard(Item):
    """An image whose bytes have been read from a shard."""

    def read(self) -> Tuple[str, bytes]:
        """As any item's: the extension by what the bytes are."""
        with Image.open(io.BytesIO(self.picture)) as image:
            kind = (image.format or "png").lower()
        return {"jpeg": "jpg", "tiff": "tif"}.get(kind, kind), self.picture


def shard_items(shards: Iterable[Any]) -> Iterator[Item]:
    """The images of caption shards, in order, one at a time."""
    for shard in shards:
        for key, rows in rows_by_sample(shard.path, CAPTION, per_image=True):
            for row in rows:
                if row.problem:
                    logging.warning("%s: %s", row.annotation["source"], row.problem)
                    continue
                entry = {"image_id": row.annotation.get("image_id", key), "caption": row.annotation.get("caption", [])}
                yield _InShard(f"{shard.path.stem}_{key}", [entry], picture=row.image)


def part_of(folder: Path, number: int) -> Path:
    """The file of a block's result."""
    return folder / PARTS / f"{number:08d}.jsonl"


def begin(folder: Path, about: Dict[str, Any]) -> None:
    """Make the folder, or find out that it is that of the same work.

    Raises:
        BadDataError: if it is of another one.
    """
    path = folder / ABOUT
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        differing = [
            f"{key} was {before[key]!r} and is {value!r}" for key, value in about.items() if before[key] != value
        ]
        if differing:
            raise BadDataError(f"{folder}: of another call before ({'; '.join(differing)}); choose another folder")
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise BadDataError(f"{folder}: expected a new or empty folder, got one that holds other files")
    folder.mkdir(parents=True, exist_ok=True)
    with whole_or_nothing(path) as temporary:
        temporary.write_text(json.dumps(about, indent=1), encoding="utf-8")


def as_line(row: Row) -> str:
    """A line of a table (JSON Lines)."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def rows_of(path: Path) -> List[Row]:
    """The rows of a table. (A text may hold what else ends a line, as U+2028 does.)"""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def merge(folder: Path) -> Dict[str, int]:
    """All blocks' rows into ``kept.jsonl`` and ``dropped.jsonl``; how many each has."""
    counts = {"kept": 0, "dropped": 0}
    with whole_or_nothing(folder / KEPT) as kept, whole_or_nothing(folder / DROPPED) as dropped:
        with open(kept, "w", encoding="utf-8") as good, open(dropped, "w", encoding="utf-8") as bad:
            for part in sorted((folder / PARTS).glob("*.jsonl")):
                for row in rows_of(part):
                    is_bad = "reason" in row
                    (bad if is_bad else good).write(as_line(row))
                    counts["dropped" if is_bad else "kept"] += 1
    return counts
