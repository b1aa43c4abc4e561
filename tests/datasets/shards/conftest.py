"""Shards written as anyone would write them: webdataset's TarWriter, real JPEG and PNG bytes."""

import io
import json
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import pytest
import webdataset
from PIL import Image

SIDE = 24


def _picture(number: int, extension: str = "png") -> bytes:
    """A picture that tells its number by its pixels."""
    pixels = np.random.RandomState(number).randint(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, {"jpg": "jpeg"}.get(extension, extension))
    return file.getvalue()


@pytest.fixture(scope="session")
def picture():
    """A function: the bytes of a picture by its number."""
    return _picture


@pytest.fixture(scope="session")
def write_shard():
    """A function: write samples, dicts of ``__key__`` and members; dicts and lists become JSON."""

    def write(path: Path, samples: List[Dict[str, Any]]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with webdataset.TarWriter(str(path), mtime=0) as tar:
            for sample in samples:
                packed = {k: json.dumps(v).encode() if isinstance(v, (dict, list)) else v for k, v in sample.items()}
                tar.write(packed)
        return path

    return write


@pytest.fixture(scope="session")
def vqa_shards(write_shard, tmp_path_factory):
    """A function: a folder of VQA shards, one picture a sample and one or more questions each, without an index."""

    def write(sizes, questions=1, prefix="p", folder=None) -> Path:
        folder = folder or tmp_path_factory.mktemp("shards")
        number = 0
        for shard, size in enumerate(sizes):
            samples = []
            for _ in range(size):
                rows = [
                    {"question": f"what is {number}?", "answer": [f"a{number}-{q}"], "question_id": number * 10 + q}
                    for q in range(questions)
                ]
                samples.append({"__key__": f"{prefix}{number:05d}", "png": _picture(number), "json": rows})
                number += 1
            write_shard(folder / f"{shard:03d}.tar", samples)
        return folder

    return write
