"""What the frozen encoders say of the images: computed once, and shared by all arms that would compute the same."""

import json
import logging
from pathlib import Path
from typing import Any, Dict, Hashable, Iterator, List, Mapping, Optional, Tuple

import torch

from lavis_kvmod.datasets.loading.images import one_of_each_image
from lavis_kvmod.models.vision.feature_cache import FrozenFeatureCache, FrozenFeatures
from lavis_kvmod.studies.probes import Asked, probe
from lavis_kvmod.weights.files import whole_or_nothing

__all__ = ["compute_features", "read_probes", "share_features"]

_TOGETHER = 64

# In this process, by file: its trainings share the tensors.
_loaded: Dict[str, Dict[str, FrozenFeatures]] = {}


def compute_features(runner: Any, path: Path, split: str) -> int:
    """Encode every image of a run's data, and write what was said of them to ``path``; beside it, what linear probes
    read from it, which learn from the split ``train`` and are asked about ``split``.

    Returns:
        How many images; 0, with a line in the log, where a run remembers none (``cache_frozen_features`` is off, or
        its images are augmented).
    """
    model = runner.unwrap_dist_model(runner.model)
    cache: Optional[FrozenFeatureCache] = getattr(model, "feature_cache", None)
    if cache is not None:
        model.eval()
        asked: Dict[str, List[Asked]] = {}
        # As LAVIS's runner has them before it makes loaders: data set -> split -> data.
        for name, dataset in [pair for splits in runner.datasets.values() for pair in splits.items()]:
            keys: Dict[Hashable, str] = {}
            for batch in _batches(dataset):
                with torch.no_grad(), runner.autocast():
                    image = batch["image"].to(runner.device)
                    model.frozen_features({"image": image, "image_key": batch["image_key"]})
                keys.update(zip(batch["image_of"], batch["image_key"]))
            asked.setdefault(name, []).extend(_questions(dataset, keys))
    if not cache:
        logging.info("features are not shared: cache_frozen_features is off, or images are augmented")
        return 0
    probes = probe(asked.get("train", []), asked.get(split, []), cache.entries())
    with whole_or_nothing(_of_probes(path)) as temporary:
        temporary.write_text(json.dumps(probes), encoding="utf-8")
    with whole_or_nothing(path) as temporary:
        torch.save({key: tuple(own) for key, own in cache.entries().items()}, temporary)
    return len(cache)


def read_probes(path: Path) -> Dict[str, Dict[str, float]]:
    """What `compute_features` has left beside ``path``; nothing where it did not."""
    file = _of_probes(path)
    probes: Dict[str, Dict[str, float]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return probes


def share_features(runner: Any, path: Path) -> None:
    """Give a run the features of a file that `compute_features` has written, if it did."""
    cache = getattr(runner.unwrap_dist_model(runner.model), "feature_cache", None)
    if cache is None or not path.is_file():
        return
    if str(path) not in _loaded:
        _loaded.clear()  # members come seed by seed, and a file may be large
        saved = torch.load(path, map_location="cpu", weights_only=True)
        _loaded[str(path)] = {key: FrozenFeatures(*own) for key, own in saved.items()}
    cache.remember(_loaded[str(path)])


def _batches(dataset: Any) -> Iterator[Dict[str, Any]]:
    """Each image of a data set once, with its key; nothing where images have no key."""
    if not hasattr(dataset, "image_of"):
        return
    firsts = one_of_each_image(dataset)
    for start in range(0, len(firsts), _TOGETHER):
        samples: List[Dict[str, Any]] = [dataset[i] for i in firsts[start : start + _TOGETHER]]
        if any("image_key" not in sample for sample in samples):
            return
        shown = zip(map(dataset.image_of, firsts[start : start + _TOGETHER]), samples)
        each = [image for name, sample in shown for image in _one_by_one(name, sample)]
        names, keys, images = zip(*each)
        yield {"image_of": list(names), "image": torch.stack(images), "image_key": list(keys)}


def _one_by_one(name: Hashable, sample: Dict[str, Any]) -> List[Tuple[Hashable, str, torch.Tensor]]:
    """A sample's image: what it is known by, its key, itself. Of several each, by no name that is asked about."""
    key, image = sample["image_key"], sample["image"]
    if isinstance(key, str):
        return [(name, key, image)]
    return [((name, i), own, image[i]) for i, own in enumerate(key)]


def _questions(dataset: Any, keys: Mapping[Hashable, str]) -> List[Asked]:
    """The questions of a data set that have a type and one answer, about images whose key is known."""
    rows: List[Mapping[str, Any]] = getattr(dataset, "annotation", None) or []
    return [
        Asked(keys[dataset.image_of(i)], row["question_type"], row["question"], row["answer"][0])
        for i, row in enumerate(rows)
        if row.get("question_type") and len(row.get("answer") or ()) == 1 and dataset.image_of(i) in keys
    ]


def _of_probes(path: Path) -> Path:
    return path.with_suffix(".probes.json")
