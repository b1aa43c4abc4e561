"""``lavis-kvmod pack`` on every data set, from files in its layout: what the shards give is what the rows say."""

import csv
import tarfile
from pathlib import Path

import pytest
import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf

from lavis_kvmod.commands.pack import pack
from lavis_kvmod.config.loading import load_config
from lavis_kvmod.datasets.checks import builder_getter

BALANCED = {"type": "balanced_testdev"}
OFFICIAL_NOCAPS = {
    "build_info": {"annotations": {"val": {"storage": ["nocaps/annotations/nocaps_val_4500_captions.json"]}}}
}
SETS = [
    ("custom_vqa", None, ["train", "val", "test"]),
    ("custom_caption", None, ["train", "val", "test"]),
    ("artquest", None, ["train", "val", "test"]),
    ("vqav2", {}, ["train", "val", "test"]),
    ("textvqa", {}, ["val"]),
    ("coco_vqa", {}, ["train", "val", "test"]),
    ("ok_vqa", {}, ["train", "test"]),
    ("aok_vqa", {}, ["train", "val", "test"]),
    ("gqa", BALANCED, ["train", "val"]),
    ("vg_vqa", {}, ["train"]),
    ("coco_caption", {}, ["train", "val", "test"]),
    ("vg_caption", {}, ["train"]),
    ("nocaps", OFFICIAL_NOCAPS, ["val"]),
    ("digits_caption", {}, ["val"]),  # without files; test_packing.py has its questions
]
KEPT = ("image_id", "question_id", "question", "question_type", "answer_type", "answer", "weight", "caption")


@pytest.fixture()
def packed(benchmarks, model_config, tmp_path):
    """A function: a data set as its run file builds it, and as its shards give it, by split."""

    def processors(kind):
        image, text = {"name": "blip_image_eval", "image_size": 28}, {"name": f"blip_{kind}"}
        return {key: {"train": p, "eval": p} for key, p in (("vis_processor", image), ("text_processor", text))}

    def make(name, section, splits):
        kind = "caption" if "cap" in name else "question"
        section = {
            **processors(kind),
            **(own_files(name, splits, benchmarks, tmp_path) if section is None else section),
        }
        used = {
            "train_splits": [s for s in splits if s == "train"],
            "evaluate": "train" not in splits,
            "valid_splits": [s for s in splits if s != "train"],
        }
        run = {"task": "kvmod_captioning" if kind == "caption" else "kvmod_vqa", "device": "cpu", **used}
        model = {**model_config(), "model_type": "pretrain_opt2.7b"}
        config = OmegaConf.create({"model": model, "datasets": {name: section}, "run": run})
        OmegaConf.save(config, tmp_path / "run.yaml")
        pack("run.yaml", "shards", max_count=3)
        cfg = load_config("run.yaml")
        data = builder_getter(cfg.run_cfg)(name)(cfg.datasets_cfg[name]).build_datasets()
        builder = registry.get_builder_class("wds_caption" if kind == "caption" else "wds_vqa")
        (defaults,) = OmegaConf.load(builder.default_config_path()).datasets.values()

        def read(split, folder):
            own = {"build_info": {"annotations": {split: {"storage": folder}}}, **processors(kind)}
            return builder(OmegaConf.merge(defaults, own)).build_datasets()[split]

        return data, read

    return make


def own_files(name, splits, benchmarks, tmp_path):
    """Tables of a user's own about photographs in a sub-folder; each has two rows."""
    rows = [
        {
            "image": f"COCO_train2014_{i:012d}.jpg",
            "question": f"Is it number {i}, „{way}“?",
            "answer": answer,
            "question_type": way,
            "caption": f"a {way} {answer}",
        }
        for way in ("straight", "fröhlich")
        for i, answer in enumerate(("astronaut", "cat", "cup", "rocket"), start=1)
    ]
    for split in splits:
        with open(tmp_path / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return {
        "build_info": {
            "images": {"storage": str(benchmarks / "coco/images")},
            "annotations": {split: {"storage": f"{split}.csv"} for split in splits},
        }
    }


def batches(dataset):
    """A data set's samples as training gets them: text, answers, weights and pixels, sorted."""
    if hasattr(dataset, "make_loader"):
        made = dataset.make_loader(batch_size=4)
    else:
        made = [dataset.collater([dataset[i] for i in range(len(dataset))])]
    found = []
    for batch in made:
        counts = batch["n_answers"].tolist() if "n_answers" in batch else [0] * len(batch["text_input"])
        place = 0
        for text, image, count in zip(batch["text_input"], batch["image"], counts):
            answers, weights = (list(batch[k][place : place + count]) if count else [] for k in ("answer", "weight"))
            found.append((text, answers, [float(weight) for weight in weights], image.tolist()))
            place += count
    return sorted(found)


def stored_images(folder):
    for path in Path(folder).glob("*.tar"):
        with tarfile.open(path) as tar:
            yield from (tar.extractfile(m).read() for m in tar if not m.name.endswith(".json"))


@pytest.mark.parametrize("name, section, splits", SETS, ids=[name for name, *_ in SETS])
def test_what_is_packed_is_what_is_read(packed, name, section, splits):
    data, read = packed(name, section, splits)
    for split in splits:
        folder = f"shards/{split}"
        rows = data[split].annotation
        images = {row["image"]: Path(row["image"]).read_bytes() for row in rows if "image" in row}
        if images:
            assert sorted(stored_images(folder)) == sorted(images.values())  # each once, to the byte
        if split == "train":
            assert batches(read("train", folder)) == batches(data["train"])

        evaluated = read("val", folder)  # which carries its annotations
        found = [pair for b in evaluated.make_loader(batch_size=3) for pair in zip(b["annotation"], b["image"])]
        if split == "train" and "caption" in rows[0]:  # one a caption in training, one an image here
            told = {}
            for row in rows:
                told.setdefault(row["image_id"], []).extend(row["caption"])
            assert {a["image_id"]: a["caption"] for a, _ in found} == told
            continue
        assert len(found) == len(rows) == len(evaluated)
        for i, (row, (got, image)) in enumerate(zip(rows, in_order(found, rows))):
            kept = [key for key in KEPT if row.get(key) is not None]
            assert {key: got[key] for key in kept} == {key: row[key] for key in kept}
            assert torch.equal(image, data[split][i]["image"])
            if "image_name" in row:
                assert got["image"] == row["image_name"]
        if getattr(data[split], "answer_list", None):
            assert evaluated.answer_list == data[split].answer_list


def in_order(found, rows):
    """The shards' samples in the order of the rows: training's are shuffled, and all of an image stand together."""
    by_row = {(sample[0]["image_id"], sample[0].get("question")): sample for sample in found}
    return [by_row[row["image_id"], row.get("question")] for row in rows]
