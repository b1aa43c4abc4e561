"""Take a validation and a test split away from the training rows, whole images at a time."""

import hashlib
from typing import Any, Dict, List, Mapping, Sequence

from lavis_kvmod.datasets.annotated import Annotation
from lavis_kvmod.datasets.bad_samples import BadDataError

__all__ = ["DEFAULT_SEED", "split_by_image", "split_problems"]

DEFAULT_SEED = 42


def split_problems(split: Mapping[str, Any], files: Sequence[str]) -> List[str]:
    """What is wrong with a ``split`` section such as ``{val: 0.1, test: 0.1, seed: 42}``.

    Args:
        split: the section.
        files: the splits that have files of their own.
    """
    problems = []
    shares = {name: share for name, share in split.items() if name != "seed"}
    for name, share in shares.items():
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
            problems.append(f"split.{name}: expected a share of the images between 0 and 1, got {share!r}")
        if name == "train":
            problems.append("split.train: train is what the others leave; give the others' shares")
        elif name in files:
            problems.append(
                f"split.{name}: {name} has a file of its own under build_info.annotations; remove one of the two"
            )
    seed = split.get("seed", DEFAULT_SEED)
    if isinstance(seed, bool) or not isinstance(seed, int):
        problems.append(f"split.seed: expected a whole number, got {seed!r}")
    if not problems and sum(shares.values()) >= 1:
        problems.append(f"split: expected shares that sum to less than 1, got {sum(shares.values()):g}")
    if "train" not in files:
        problems.append("split: takes images away from train, and build_info.annotations has no train")
    return problems


def split_by_image(rows: Sequence[Annotation], shares: Mapping[str, float], seed: int) -> Dict[str, List[Annotation]]:
    """``train`` and the splits that ``shares`` names, each image with all its rows in one of them.

    Which images go where depends on their names and the seed, not on the order of the rows. A split gets its share of
    the images, rounded, and at least one. Rows keep their order. Images that a row has together stay together, and with
    them all that share one with them.

    Args:
        rows: annotations with an ``image_name``, all of them good.
        shares: the share of the images by split, such as ``{"val": 0.1}``.
        seed: another seed chooses other images.

    Raises:
        BadDataError: if there are too few images.
    """
    names = _together(rows)
    images = sorted(set(names), key=lambda name: _lot(seed, name))
    sizes = {split: max(1, round(share * len(images))) for split, share in shares.items()}
    if sum(sizes.values()) >= len(images):
        wanted = ", ".join(f"{split} {size}" for split, size in sizes.items())
        raise BadDataError(f"split: {len(images)} images are too few for {wanted} and some to train on")
    split_of, start = {}, 0
    for split, size in sizes.items():
        split_of.update(dict.fromkeys(images[start : start + size], split))
        start += size
    divided: Dict[str, List[Annotation]] = {split: [] for split in ("train", *sizes)}
    for row, name in zip(rows, names):
        divided[split_of.get(name, "train")].append(row)
    return divided


def _together(rows: Sequence[Annotation]) -> List[str]:
    """For each row a name that it shares with all rows that must be in the same split: its image's, or, where rows have
    several, one for all that are joined by shared images."""
    first: Dict[str, str] = {}  # an image's path -> one that it belongs with, and so on to itself

    def root(path: str) -> str:
        while first.setdefault(path, path) != path:
            path = first[path]
        return path

    for row in rows:
        if isinstance(row["image"], tuple) and row["image"]:
            one, *others = sorted(map(root, row["image"]))
            first.update(dict.fromkeys(others, one))
    if not first:
        return [row["image_name"] for row in rows]
    called: Dict[str, str] = {}
    images = [row["image"] if isinstance(row["image"], tuple) else (row["image"],) for row in rows]
    roots = [root(next(iter(own), row["image_name"])) for row, own in zip(rows, images)]
    for row, found in zip(rows, roots):
        called[found] = min(called.get(found, row["image_name"]), row["image_name"])
    return [called[found] for found in roots]


def _lot(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogatepass")).digest()
