"""LAVIS's sets of captions."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any, Dict, List

from lavis_kvmod.datasets.annotated import Annotation
from lavis_kvmod.datasets.bad_samples import BadDataError
from lavis_kvmod.datasets.builder import CaptionBuilder
from lavis_kvmod.datasets.lavis_sets.base import COCO_IMAGES, VG_IMAGES, LavisFilesBuilder, rows_in
from lavis_kvmod.datasets.official import entries_in, read_json

__all__ = ["COCOCaption", "NoCaps", "VGCaption"]

_COCO_NAME = re.compile(r"COCO_[a-z]+\d+_(\d+)$")


# LAVIS's names of Karpathy's splits; those of "restval" are trained on, too.
_KARPATHY = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}


class COCOCaption(LavisFilesBuilder, CaptionBuilder):
    """``coco_caption``, in the Karpathy split: LAVIS's files, a split each, or ``dataset_coco.json``, which has all."""

    images_from = COCO_IMAGES

    def read(self, split: str, paths: List[Path]) -> List[Annotation]:
        """Rows with their captions as a list, and COCO's image id."""
        rows = []
        for path in paths:
            content = read_json(path)
            if isinstance(content, dict):
                rows += _karpathy_images(content, path, split)
            else:
                rows += [_captioned(row) for row in rows_in(content, path)]
        return rows


class VGCaption(COCOCaption):
    """``vg_caption``, for training beside another set."""

    images_from = VG_IMAGES


def _karpathy_images(content: Dict[str, Any], path: Path, split: str) -> List[Annotation]:
    """A split's images in Karpathy's own file (A. Karpathy, L. Fei-Fei, arXiv 1412.2306)."""
    needed = ("filepath", "filename", "cocoid", "sentences", "split")
    rows = []
    for number, entry in enumerate(entries_in(content, path, "images")):
        missing = [name for name in needed if name not in entry]
        if missing:
            raise BadDataError(f"{path}: entry {number} of 'images' has no {', '.join(missing)}")
        if entry["split"] in _KARPATHY[split]:
            rows.append(
                {
                    "image": f"{entry['filepath']}/{entry['filename']}",
                    "image_id": entry["cocoid"],
                    "caption": [sentence["raw"] for sentence in entry["sentences"]],
                    "source": f"{path.name}, image {entry['cocoid']}",
                }
            )
    return rows


def _captioned(row: Annotation) -> Annotation:
    captions = row.pop("caption", None)
    if captions is not None:
        row["caption"] = [captions] if isinstance(captions, str) else list(captions)
    coco = _COCO_NAME.search(Path(str(row.get("image"))).stem)
    if coco:
        row["image_id"] = int(coco.group(1))
    return row


class NoCaps(LavisFilesBuilder, CaptionBuilder):
    """``nocaps``: LAVIS's list of images, nocaps.org's file of images and captions, or both, in either order.

    Rows of the official file have a ``domain``: in, near or out.
    """

    images_from = (
        "https://github.com/salesforce/LAVIS/blob/main/lavis/datasets/download_scripts/download_nocaps.py fetches them"
    )

    def read(self, split: str, paths: List[Path]) -> List[Annotation]:
        """The images of LAVIS's list, or of the official file, with the captions of the latter."""
        listed, official = [], {}
        for path in paths:
            content = read_json(path)
            if isinstance(content, dict):
                official.update(_nocaps_images(content, path))
            else:
                listed += [{**_captioned(row), "image_id": row.get("img_id")} for row in rows_in(content, path)]
        if not listed:
            return list(official.values())
        lost = [row["image_id"] for row in listed if official and row["image_id"] not in official]
        if lost:
            raise BadDataError(f"{len(lost)} of {len(listed)} images are not among the captions, such as {lost[0]}")
        return [{**official.get(row["image_id"], {}), **row} for row in listed]


def _nocaps_images(content: Dict[str, Any], path: Path) -> Dict[Any, Annotation]:
    captions = defaultdict(list)
    for entry in entries_in(content, path, "annotations") if "annotations" in content else ():
        captions[entry["image_id"]].append(entry["caption"])
    images = {}
    for entry in entries_in(content, path, "images"):
        images[entry["id"]] = {
            "image": entry["file_name"],
            "image_id": entry["id"],
            "domain": entry.get("domain", ""),
            "source": f"{path.name}, image {entry['id']}",
            **({"caption": captions[entry["id"]]} if entry["id"] in captions else {}),
        }
    return images
