"""LAVIS's sets of captions."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any, Dict, List

from lavis_kvmod.datasets.annotated import Annotation
from lavis_kvmod.datasets.bad_samples import BadDataError
from lavis_kvmod.datasets.builder import CaptionBuilder
from lavis_kvmod.datasets.lavis_sets.base import COCO_IMAGES, VG_IMAGES, LavisFilesBuilder, read_rows
from lavis_kvmod.datasets.official import entries, read_json

__all__ = ["COCOCaption", "NoCaps", "VGCaption"]

_COCO_NAME = re.compile(r"COCO_[a-z]+\d+_(\d+)$")


class COCOCaption(LavisFilesBuilder, CaptionBuilder):
    """``coco_caption``, in the Karpathy split."""

    images_from = COCO_IMAGES

    def read(self, split: str, paths: List[Path]) -> List[Annotation]:
        """Rows with their captions as a list, and COCO's image id."""
        return [_captioned(row) for path in paths for row in read_rows(path)]


class VGCaption(COCOCaption):
    """``vg_caption``, for training beside another set."""

    images_from = VG_IMAGES


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
            if isinstance(read_json(path), dict):
                official.update(_nocaps_images(path))
            else:
                listed += [{**_captioned(row), "image_id": row.get("img_id")} for row in read_rows(path)]
        if not listed:
            return list(official.values())
        lost = [row["image_id"] for row in listed if official and row["image_id"] not in official]
        if lost:
            raise BadDataError(f"{len(lost)} of {len(listed)} images are not among the captions, such as {lost[0]}")
        return [{**official.get(row["image_id"], {}), **row} for row in listed]


def _nocaps_images(path: Path) -> Dict[Any, Annotation]:
    captions = defaultdict(list)
    for entry in entries(path, "annotations") if "annotations" in read_json(path) else ():
        captions[entry["image_id"]].append(entry["caption"])
    images = {}
    for entry in entries(path, "images"):
        images[entry["id"]] = {
            "image": entry["file_name"],
            "image_id": entry["id"],
            "domain": entry.get("domain", ""),
            "source": f"{path.name}, image {entry['id']}",
            **({"caption": captions[entry["id"]]} if entry["id"] in captions else {}),
        }
    return images
