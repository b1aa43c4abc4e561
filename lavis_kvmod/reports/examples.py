"""Which predictions a report shows, and their pictures."""

import logging
import math
from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence

import torch
from lavis.processors.blip_processors import BlipImageBaseProcessor
from PIL import Image
from torch import Tensor

from lavis_kvmod.datasets.images import read_image
from lavis_kvmod.datasets.video import VIDEO_SUFFIXES
from lavis_kvmod.tasks.evaluation import Evaluated, Row, side_by_side

SHOWN = 4  # examples of each kind
_SIDE = 256  # pixels of a thumbnail's longer side


class Examples(NamedTuple):
    """Some rows, and why these."""

    title: str
    rows: List[Row]


def choose(rows: Sequence[Row], goodness: Sequence[str], count: int = SHOWN) -> List[Examples]:
    """The worst and the best rows, and some from between, always the same ones.

    Of equally bad or good rows those come first of which the model was surest. An image is shown once in each group,
    as far as there are others.

    Args:
        goodness: row keys that say how good a row is; the first one that is there decides. Without any, rows from
            all over the set are shown.
    """
    key = next((key for key in goodness if any(_is_number(row.get(key)) for row in rows)), None)
    if key is None:
        return [Examples("Examples", _spread(rows, count))]
    scored = [row for row in rows if _is_number(row.get(key))]
    worst = sorted(scored, key=lambda row: (row[key], -row.get("confidence", 0.0)))  # ties keep the set's order
    best = sorted(scored, key=lambda row: (-row[key], -row.get("confidence", 0.0)))
    return [
        Examples(f"Lowest {key}", _distinct(worst, count)),
        Examples(f"Highest {key}", _distinct(best, count)),
        Examples(f"From lowest to highest {key}", _spread(worst, count)),
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _distinct(rows: Iterable[Row], count: int) -> List[Row]:
    rows = list(rows)
    first_of: Dict[Any, Row] = {}
    for row in rows:
        first_of.setdefault(row["image"], row)
    chosen = list(first_of.values())[:count]
    others = (row for row in rows if not any(row is one for one in chosen))
    return chosen + [row for row, _ in zip(others, range(count - len(chosen)))]


def _spread(rows: Sequence[Row], count: int) -> List[Row]:
    count = min(count, len(rows))
    return [rows[len(rows) * (2 * i + 1) // (2 * count)] for i in range(count)]


def thumbnail(row: Row, evaluated: Evaluated) -> Optional[Image.Image]:
    """A row's picture: its file, else what the data set gives the model; None, with a log line, if neither can be had.

    Small pictures are enlarged by whole pixels.
    """
    try:
        image = _from_file(row, evaluated.dataset) or _from_data_set(row, evaluated)
    except (OSError, ValueError) as error:  # what reading images raises, here and in data sets
        logging.warning("the report shows no picture of %s: %s", row["image"], error)
        return None
    if image is None:
        return None
    factor = _SIDE // max(image.size)
    if factor > 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((_SIDE, _SIDE))
    return image


def _from_file(row: Row, dataset: Any) -> Optional[Image.Image]:
    if not isinstance(row["image"], str) or Path(row["image"]).suffix.lower() in VIDEO_SUFFIXES:
        return None
    path = Path(getattr(dataset, "vis_root", None) or "") / row["image"]  # an absolute path survives the join
    if not path.is_file():
        return None
    return read_image(path)


def _from_data_set(row: Row, evaluated: Evaluated) -> Optional[Image.Image]:
    dataset, instance = evaluated.dataset, row["instance_id"]
    pixels = evaluated.pictures.get(instance)
    if pixels is None:
        places = {ann["instance_id"]: i for i, ann in enumerate(getattr(dataset, "annotation", None) or [])}
        if instance not in places or not hasattr(dataset, "__getitem__"):
            return None
        pixels = dataset[places[instance]]["image"]
    if not len(pixels):  # a conversation without images
        return None
    return _to_image(side_by_side(pixels), getattr(dataset, "vis_processor", None))


def _to_image(pixels: Tensor, processor: Any) -> Image.Image:
    """(3, H, W), normalised as the processor does (LAVIS's way if it does not say) -> a picture."""
    normalize: Any = getattr(processor, "normalize", None)
    if not hasattr(normalize, "mean"):
        normalize = BlipImageBaseProcessor().normalize
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (normalize.mean, normalize.std))
    levels = ((pixels.float() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())
