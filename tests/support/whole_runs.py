"""A run that is small, and random wherever a real one is: crops, dropout, drawn answers of different lengths. Fixtures
for the conftest.py files that import them."""

import json
from itertools import zip_longest

import pytest
import torch
import webdataset
from omegaconf import OmegaConf
from PIL import Image

from lavis_kvmod.datasets.shards.counting import write_indices
from lavis_kvmod.weights import files as checkpoints

__all__ = ["assert_same_run", "write_run"]

WORDS = ["red", "seven", "yes", "the ink is blue", "a cat on a mat", "no, it is even"]


@pytest.fixture()
def write_run(tmp_path, model_config, monkeypatch):
    """A function: the path of a run file with 13 training samples, with overrides of its model and run sections."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    for i in range(13):
        Image.effect_noise((40 + i, 36), 60).convert("RGB").save(data / f"{i}.png")

    def rows(ids):
        return [
            {
                "image": f"{i % 13}.png",
                "question": f"what is written on scan {i}?",
                "question_id": i,
                "answer": [WORDS[i % 6], WORDS[i % 6], WORDS[(i + 1) % 6]],
                "dataset": "vqa",
            }
            for i in ids
        ]

    (data / "train.json").write_text(json.dumps(rows(range(13))))
    (data / "val.json").write_text(json.dumps(rows(range(13, 17))))
    (data / "answers.json").write_text(json.dumps(WORDS))
    evaluated = [str(data / "val.json"), str(data / "answers.json")]
    train_file = [str(data / "train.json")]

    builds = {
        "coco_vqa": {
            "annotations": {
                "train": {"url": train_file, "storage": train_file},
                "val": {"url": evaluated, "storage": evaluated},
                "test": {"url": evaluated, "storage": evaluated},
            },
            "images": {"storage": str(data)},
        },
        "wds_vqa": {"annotations": {s: {"storage": str(data / s / "*.tar")} for s in ("train", "val")}},
    }

    def write_shards():
        for split, given in (("train", rows(range(13))), ("val", rows(range(13, 17)))):
            (data / split).mkdir(exist_ok=True)
            for shard in range(3):
                with webdataset.TarWriter(str(data / split / f"{shard}.tar"), mtime=0) as tar:
                    for row in given[shard::3]:
                        picture = (data / row["image"]).read_bytes()
                        told = {key: row[key] for key in ("question", "question_id", "answer")}
                        tar.write(
                            {"__key__": f"{row['question_id']:03}", "png": picture, "json": json.dumps(told).encode()}
                        )
            write_indices([str(data / split)])

    def write(model=(), crops="blip_image_train", name="run.yaml", dataset="coco_vqa", **run):
        if dataset == "wds_vqa":
            write_shards()
        cfg = {
            "model": {**model_config(**dict(model)), "model_type": "pretrain_opt2.7b"},
            "datasets": {
                dataset: {
                    "vis_processor": {
                        "train": {"name": crops, "image_size": 28},
                        "eval": {"name": "blip_image_eval", "image_size": 28},
                    },
                    "text_processor": {k: {"name": "blip_question"} for k in ("train", "eval")},
                    "build_info": builds[dataset],
                }
            },
            "run": {
                "task": "kvmod_vqa",
                "device": "cpu",
                "max_epoch": 2,
                "init_lr": 1e-3,
                "warmup_steps": 3,
                "warmup_lr": 1e-5,
                "batch_size_train": 2,
                "batch_size_eval": 4,
                "num_workers": 0,
                "num_beams": 1,
                "max_len": 2,
                "output_dir": "output",
                "valid_splits": ["val"],
                "test_splits": [],
                "tensorboard": False,
                **run,
            },
        }
        path = tmp_path / name
        OmegaConf.save(OmegaConf.create(cfg), path)
        return str(path)

    return write


def _flat(value, name=""):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from _flat(inner, f"{name}.{i}")
    else:
        yield name, value


def _assert_same_run(first, second):
    """Checkpoints equal in every bit (parameters, optimizer, randomness, position, metrics), and so are the logs."""
    for name in ("checkpoint_last.pth", "checkpoint_best.pth"):
        one, two = (dict(_flat({**checkpoints.read(f / name), "config": None, "log": None})) for f in (first, second))
        assert one.keys() == two.keys()
        for key, value in one.items():
            same = torch.equal(value, two[key]) if isinstance(value, torch.Tensor) else value == two[key]
            assert same, f"{name}: {key}"
    # A run that was killed before it saved anything starts anew, with the option it was then given.
    one, two = (
        [line for line in (folder / "log.txt").read_text().splitlines() if "resume_ckpt_path" not in line]
        for folder in (first, second)
    )
    different = [lines for lines in zip_longest(one, two) if lines[0] != lines[1]]
    assert not different, f"log.txt: {different}"


@pytest.fixture()
def assert_same_run():
    """A function: two run folders end alike, bit for bit."""
    return _assert_same_run
