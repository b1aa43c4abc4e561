"""Features of a data set's images and texts: computed, kept in a file, and searched.

A file (``.parquet`` or ``.safetensors``) holds, of an image, the features of all its queries, since a text is compared
with the query that fits best.
"""

import json
from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from lavis_kvmod.tasks.retrieval_scores import Best, compare
from lavis_kvmod.weights.files import whole_or_nothing

__all__ = [
    "TEXTS_A_BATCH",
    "Features",
    "embed_images",
    "embed_texts",
    "read_features",
    "require_kind",
    "search",
    "write_features",
]

KINDS = (".parquet", ".safetensors")
TEXTS_A_BATCH = 256
_IMAGES_AT_ONCE = 4096
_ROWS_A_GROUP = 1024


class Features(NamedTuple):
    """Images and texts by name, and their features of unit length: (n, q, e) and (t, e). ``about``: what made them."""

    images: List[str]
    image_features: Tensor
    texts: List[str]
    text_features: Tensor
    about: Dict[str, str]


@torch.no_grad()
def embed_images(model: Any, batches: Iterable[Dict[str, Any]]) -> Tensor:
    """All images of the batches, by a stage-1 model: (n, q, e) on the CPU."""
    found = [model.image_features(model.features(samples)).float().cpu() for samples in batches]
    return torch.cat(found) if found else torch.zeros(0, model.query_tokens.shape[1], model.vision_proj.out_features)


@torch.no_grad()
def embed_texts(model: Any, texts: Sequence[str]) -> Tensor:
    """Texts, by a stage-1 model: (t, e) on the CPU."""
    blocks = [texts[start : start + TEXTS_A_BATCH] for start in range(0, len(texts), TEXTS_A_BATCH)]
    found = [model.text_features(model.tokenise(block)).float().cpu() for block in blocks]
    return torch.cat(found) if found else torch.zeros(0, model.text_proj.out_features)


def search(features: Features, wanted: Tensor, count: int) -> Best:
    """The images that fit each of the wanted texts (t, e) best; exact, by FAISS if it is installed, else in blocks."""
    count = min(count, len(features.images))
    try:
        import faiss  # type: ignore[import-not-found]
    except ImportError:
        best = Best.none(len(wanted), count)
        for start in range(0, len(features.images), _IMAGES_AT_ONCE):
            block = features.image_features[start : start + _IMAGES_AT_ONCE]
            (scores,) = [torch.cat(list(compare(block, wanted)), dim=1)]
            best = best.with_more(scores.t(), torch.arange(start, start + len(block)))
        return best
    n, q, e = features.image_features.shape
    index = faiss.IndexFlatIP(e)
    index.add(features.image_features.reshape(n * q, e).numpy())
    # Among so many vectors at least `count` images have their best one, and it stands before their others.
    scores, places = index.search(wanted.numpy(), count * q)
    best = Best.none(len(wanted), count)
    for row, (of_row, at) in enumerate(zip(scores.tolist(), places.tolist())):
        firsts: Dict[int, float] = {}
        for score, place in zip(of_row, at):
            firsts.setdefault(place // q, score)
        chosen = list(firsts.items())[:count]
        best.numbers[row] = torch.tensor([image for image, _ in chosen])
        best.scores[row] = torch.tensor([score for _, score in chosen])
    return best


def require_kind(path: Path) -> None:
    """Raises ValueError for a file that `write_features` would not write."""
    if path.suffix not in KINDS:
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(KINDS)}")


def write_features(path: Path, features: Features) -> None:
    """Write a file of features, whole or not at all.

    Raises:
        ValueError: for another ending than those of `KINDS`.
    """
    require_kind(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_or_nothing(path) as temporary:
        (_write_parquet if path.suffix == ".parquet" else _write_safetensors)(temporary, features)


def read_features(path: Path) -> Features:
    """Read what `write_features` wrote.

    Raises:
        FileNotFoundError, ValueError: if there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file of features {path}; lavis-kvmod embed writes one")
    found = _read_parquet(path) if path.suffix == ".parquet" else _read_safetensors(path)
    if found is None:
        raise ValueError(f"{path}: expected features of lavis-kvmod embed, got another file")
    return found


def _write_safetensors(path: Path, features: Features) -> None:
    from safetensors.torch import save_file

    tensors = {"image_features": features.image_features.contiguous(), "text_features": features.text_features}
    names = {"images": json.dumps(features.images), "texts": json.dumps(features.texts)}
    save_file(tensors, str(path), {**names, "about": json.dumps(features.about)})


def _read_safetensors(path: Path) -> Optional[Features]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            names = file.metadata() or {}
            if not {"images", "texts", "about"} <= set(names):
                return None
            tensors = [file.get_tensor(name) for name in ("image_features", "text_features")]
    except SafetensorError:
        return None
    images, texts, about = (json.loads(names[key]) for key in ("images", "texts", "about"))
    return Features(images, tensors[0], texts, tensors[1], about)


def _write_parquet(path: Path, features: Features) -> None:
    """A row an image and a row a text: ``kind``, ``name``, ``features`` (q · e or e numbers)."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    shape = json.dumps([*features.image_features.shape[1:]])
    schema = pa.schema(
        [("kind", pa.string()), ("name", pa.string()), ("features", pa.list_(pa.float32()))],
        metadata={"shape": shape, "about": json.dumps(features.about)},
    )
    with ParquetWriter(str(path), schema) as writer:
        for kind, names, rows in (
            ("image", features.images, features.image_features.flatten(1)),
            ("text", features.texts, features.text_features),
        ):
            for start in range(0, len(names), _ROWS_A_GROUP):
                some = names[start : start + _ROWS_A_GROUP]
                numbers = pa.array(list(rows[start : start + _ROWS_A_GROUP].numpy()), pa.list_(pa.float32()))
                writer.write_table(pa.table([[kind] * len(some), some, numbers], schema=schema))


def _read_parquet(path: Path) -> Optional[Features]:
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    try:
        table = read_table(str(path))
    except ArrowException:
        return None
    known = table.schema.metadata or {}
    if b"shape" not in known or b"about" not in known:
        return None
    q, e = json.loads(known[b"shape"])
    kinds, names = table["kind"].to_pylist(), table["name"].to_pylist()
    num_images = kinds.count("image")
    flat = torch.from_numpy(table["features"].combine_chunks().flatten().to_numpy(zero_copy_only=False).copy())
    images = flat[: num_images * q * e].view(num_images, q, e)
    texts = flat[num_images * q * e :].view(-1, e)
    return Features(names[:num_images], images, names[num_images:], texts, json.loads(known[b"about"]))
