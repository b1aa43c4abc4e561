"""What the frozen encoders said of a data set's images, on disk: written once, read memory-mapped by every training.

    about.json                          whose features these are: a sum over each encoder's weights, image sizes
    features-r0-00000.safetensors       visual_tokens (k, n, width), pooled (k, f), and in its metadata the k image
    features-r1-00000.safetensors …     keys and a checksum; rank 0's, rank 1's …

An image key tells the image and its processor (`lavis_kvmod.datasets.annotated.pixel_key`), and so crops and sizes.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lavis_kvmod.models.vision.feature_cache import FrozenFeatures
from lavis_kvmod.weights.files import CheckpointError, whole_or_nothing

__all__ = ["FeatureFiles", "FeatureFilesError", "FeatureWriter", "fingerprint"]

ABOUT = "about.json"
# Images in a shard: 180 MB of EVA-CLIP-G's features in half precision.
SHARD = 256


class FeatureFilesError(CheckpointError):
    """Features on disk that are not this model's, or damaged; the message says which and what to do."""


def fingerprint(image_size: int, aux_form: Optional[str], **encoders: Optional[nn.Module]) -> Dict[str, str]:
    """What features depend on beside the pixels: for each encoder a sum over its weights and the size it sees.

    ``aux_form`` says it of the auxiliary encoder, with the form of its features. ``encoders`` are
    ``visual_encoder``, ``ln_vision`` and ``aux_encoder``, which may be None.
    """
    sums = {}
    for name, encoder in encoders.items():
        if encoder is None:
            continue
        digest = hashlib.sha256(f"{image_size} {aux_form if name == 'aux_encoder' else ''}".encode())
        for key, value in sorted(encoder.state_dict().items()):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(_bytes(value))
        sums[name] = digest.hexdigest()
    return sums


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


class FeatureFiles:
    """Features by image key, of the shards in a folder.

    Args:
        folder: what ``lavis-kvmod cache-features`` wrote.
        own: the `fingerprint` of the model that reads them; None leaves unchecked whose they are.

    Raises:
        FeatureFilesError: if there are none, if they are another model's, or a shard cannot be read.
    """

    def __init__(self, folder: Path, own: Optional[Mapping[str, str]] = None):
        self.folder = Path(folder)
        self.about = _about(self.folder)
        if own is not None:
            _require_same(self.folder, self.about, own)
        self._shards: List[Any] = []
        self._place: Dict[str, Tuple[int, int]] = {}
        self._has_aux = own is None or "aux_encoder" in own
        for path in sorted(self.folder.glob("features-*.safetensors")):
            shard, keys = _opened(path)
            self._place.update((key, (len(self._shards), row)) for row, key in enumerate(keys))
            self._shards.append(shard)

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, key: object) -> bool:
        return key in self._place

    def get(self, key: str) -> Optional[FrozenFeatures]:
        """An image's visual tokens (n, width) and pooled features (f,); None if they are not there."""
        place = self._place.get(key)
        if place is None:
            return None
        shard, row = self._shards[place[0]], place[1]
        pooled = shard.get_slice("pooled")[row] if self._has_aux and "pooled" in shard.keys() else None
        return FrozenFeatures(shard.get_slice("visual_tokens")[row], pooled)


def _about(folder: Path) -> Dict[str, str]:
    path = folder / ABOUT
    if not path.is_file():
        raise FeatureFilesError(
            f"model.feature_cache_dir: expected features of images in {folder}, got no {ABOUT} there; write them with "
            "lavis-kvmod cache-features --cfg-path RUN.yaml"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def _require_same(folder: Path, about: Mapping[str, str], own: Mapping[str, str]) -> None:
    other = [name for name, digest in own.items() if about.get(name) != digest]
    if other:
        raise FeatureFilesError(
            f"{folder}: these features are of other encoders than the model's ({', '.join(other)}: other weights, or "
            "another image size, prefix_source or prefix_grid); name another model.feature_cache_dir, and write it "
            "with lavis-kvmod cache-features"
        )


def _opened(path: Path) -> Tuple[Any, List[str]]:
    try:
        shard = safe_open(str(path), framework="pt")  # compares the file's length with its header
        return shard, json.loads(shard.metadata()["keys"])
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise FeatureFilesError(
            f"{path}: cannot be read ({error}); lavis-kvmod cache-features writes damaged files anew"
        ) from error


class FeatureWriter:
    """Writes shards, and goes on with those that are there: what was interrupted is missing, never half there.

    Args:
        folder: where to.
        own: the `fingerprint` of the model whose features come.
        rank: of this process, whose shards carry its number.

    Raises:
        FeatureFilesError: if the folder holds another model's features.
    """

    def __init__(self, folder: Path, own: Mapping[str, str], rank: int = 0):
        self._folder, self._rank = Path(folder), rank
        if (self._folder / ABOUT).is_file():
            _require_same(self._folder, _about(self._folder), own)
        else:
            with whole_or_nothing(self._folder / ABOUT) as temporary:
                temporary.write_text(json.dumps(dict(own), indent=1), encoding="utf-8")
        self._keys: List[str] = []
        self._features: List[FrozenFeatures] = []

    def remove_damaged(self) -> int:
        """Compare every shard with its checksum and remove those that differ; returns how many. For one process."""
        removed = 0
        for path in sorted(self._folder.glob("features-*.safetensors")):
            problem = _damage(path)
            if problem is not None:
                logging.warning("%s is damaged (%s): removed, its images are encoded anew", path, problem)
                path.unlink()
                removed += 1
        return removed

    def add(self, keys: Sequence[str], features: FrozenFeatures) -> None:
        """Features of several images; a shard is written when it is full."""
        for row, key in enumerate(keys):
            pooled = None if features.pooled is None else features.pooled[row].cpu()
            self._keys.append(key)
            self._features.append(FrozenFeatures(features.visual_tokens[row].cpu(), pooled))
            if len(self._keys) == SHARD:
                self.flush()

    def flush(self) -> None:
        """Write what has come since the last shard."""
        if not self._keys:
            return
        tensors = {"visual_tokens": torch.stack([each.visual_tokens for each in self._features])}
        pooled = [each.pooled for each in self._features if each.pooled is not None]
        if pooled:
            tensors["pooled"] = torch.stack(pooled)
        taken = [
            int(path.stem.rpartition("-")[2]) for path in self._folder.glob(f"features-r{self._rank}-*.safetensors")
        ]
        path = self._folder / f"features-r{self._rank}-{max(taken, default=-1) + 1:05d}.safetensors"
        metadata = {"keys": json.dumps(self._keys), "sha256": _checksum(tensors)}
        with whole_or_nothing(path) as temporary:
            save_file(tensors, temporary, metadata)
        self._keys, self._features = [], []


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _damage(path: Path) -> Optional[str]:
    try:
        shard, _ = _opened(path)
        if _checksum({name: shard.get_tensor(name) for name in shard.keys()}) != shard.metadata().get("sha256"):
            return "its checksum is another"
    except (FeatureFilesError, SafetensorError) as error:
        return str(error)
    return None
