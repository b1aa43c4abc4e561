"""Files as users have them: real photographs, which scikit-image ships, in folders, with annotation files beside."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import skimage.data
from omegaconf import OmegaConf

PHOTOGRAPHS = ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg")


@pytest.fixture(scope="session")
def shipped_photos():
    """The folder of scikit-image's photographs. Read only."""
    return Path(skimage.data.__file__).parent


@pytest.fixture()
def photos(tmp_path, shipped_photos):
    """A folder with photographs, half of them in a subfolder."""
    for i, name in enumerate(PHOTOGRAPHS):
        folder = tmp_path / "photos" / ("more" if i % 2 else "")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(shipped_photos / name, folder / name)
    return tmp_path / "photos"


@pytest.fixture()
def write_csv(tmp_path):
    """A function: writes rows (dicts) to a CSV file and returns its path."""

    def write(name, rows, delimiter=",", encoding="utf-8"):
        path = tmp_path / name
        with open(path, "w", newline="", encoding=encoding) as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
        return path

    return write


@pytest.fixture()
def write_jsonl(tmp_path):
    """A function: writes objects to a JSON Lines file and returns its path."""

    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture()
def section_of():
    """A function: the section a run file's data set has after merging: the builder's defaults with overrides."""

    def make(builder, **overrides):
        (defaults,) = OmegaConf.load(builder.default_config_path()).datasets.values()
        small = {"vis_processor": {stage: {"image_size": 28} for stage in ("train", "eval")}}
        return OmegaConf.merge(defaults, small, overrides)

    return make


@pytest.fixture()
def run_file(tmp_path, photos, model_config, monkeypatch):
    """A function: the path of a small run file over `photos` with one data set, and overrides."""
    monkeypatch.chdir(tmp_path)

    def write(name, section, **run):
        processors = {stage: {"name": "blip_image_eval", "image_size": 28} for stage in ("train", "eval")}
        cfg = {
            "model": {**model_config(), "model_type": "pretrain_opt2.7b"},
            "datasets": {
                name: OmegaConf.merge(
                    {"build_info": {"images": {"storage": "photos"}}, "vis_processor": processors}, section
                )
            },
            "run": {
                "task": "kvmod_captioning" if "caption" in name else "kvmod_vqa",
                "device": "cpu",
                "max_epoch": 1,
                "init_lr": 1e-3,
                "batch_size_train": 3,
                "batch_size_eval": 4,
                "num_workers": 0,
                "num_beams": 1,
                "max_len": 3,
                "output_dir": "output",
                "valid_splits": ["val"],
                "test_splits": ["test"],
                **run,
            },
        }
        OmegaConf.save(OmegaConf.create(cfg), tmp_path / "run.yaml")
        return "run.yaml"

    return write
