"""Every run file under ``projects/kvmod`` is loaded, checked and run for a few steps at small geometry, on photographs
in its benchmark's layout. Sizes, files and the device are overridden; the structure is the file's own."""

import csv
import io
import json
import re
import tarfile
from pathlib import Path

import easy_vqa
import pytest
import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf

from lavis_kvmod.commands.evaluate import evaluate
from lavis_kvmod.commands.train import train
from lavis_kvmod.config.keys import run_defaults, run_settings
from lavis_kvmod.config.loading import load_config
from lavis_kvmod.datasets import digits as digits_data
from lavis_kvmod.datasets.shards.counting import write_indices
from lavis_kvmod.demo import digits
from lavis_kvmod.models.blip2_kvmod import Blip2KVMod
from lavis_kvmod.models.settings import SETTINGS, ModelSettings, Stage1Settings
from lavis_kvmod.system.paths import resource
from lavis_kvmod.system.schema import ConfigurationError
from lavis_kvmod.weights import files as checkpoints

FOLDER = resource("projects/kvmod")
RUN_FILES = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.yaml"))
ASKED_FOR = {  # issue by issue; the test that every file runs cannot notice one that is gone
    *("vqa", "vqa_opt6.7b", "caption", "caption_opt6.7b", "okvqa", "demo_vqa", "demo_caption", "easy_vqa"),
    *("custom_vqa", "custom_caption", "custom_instruct_stage1", "custom_instruct_stage2", "artquest"),
    *("pretrain_stage1", "pretrain_stage2", "demo_stage1", "demo_stage2", "demo_retrieval", "demo_filtered"),
    *(f"eval/{name}" for name in ("vqav2", "okvqa", "coco_caption", "nocaps")),
    *(f"eval/{name}_zeroshot" for name in ("vqav2", "okvqa", "gqa", "nocaps", "textvqa")),
}


def path_of(name):
    return str(FOLDER / name)


def raw(name):
    return OmegaConf.load(FOLDER / name)


def test_the_promised_files_are_there():
    assert {f"{name}.yaml" for name in ASKED_FOR} <= set(RUN_FILES)


def test_the_benchmarks_page_names_them_all_and_nothing_else():
    page = Path(__file__).parents[2] / "docs" / "benchmarks.md"
    named = set(re.findall(r"`((?:eval/)?\w[\w.]*\.yaml)`", page.read_text(encoding="utf-8")))
    others = ("demo", "custom", "artquest", "wds")
    ours = {name for name in RUN_FILES if not name.startswith(others)}
    theirs = {"vqav2_zeroshot_opt_eval.yaml", "caption_coco_opt2.7b_eval.yaml"}  # LAVIS's
    assert named == ours | theirs


# ---------------------------------------------------------------- what a file says of itself


@pytest.mark.parametrize("name", RUN_FILES)
def test_its_head_says_what_it_needs_trains_and_takes_and_how_it_is_run(name):
    head = (FOLDER / name).read_text().partition("\nmodel:")[0]
    for part in ("Needs", "Trains", "Memory", "Command", "Values"):
        assert re.search(rf"^# {part}: +\S", head, re.M), part
    command = "evaluate" if raw(name).run.evaluate else "train"
    assert f"python -m lavis.{command} --cfg-path projects/kvmod/{name}" in head
    for model_type in re.findall(r"model\.model_type=([\w.]+\w)", head):
        assert model_type in registry.get_model_class("blip2_opt_kvmod").PRETRAINED_MODEL_CONFIG_DICT
    for section, key in re.findall(r"[ '](model|run|datasets)\.([\w.]+)=", head):
        if section == "model":
            assert hasattr(ModelSettings(), key), key
        elif section == "run":
            assert any(key in declared.model_fields for declared in run_settings(raw(name).run)), key
        else:
            dataset, _, below = key.partition(".")
            defaults = OmegaConf.load(registry.get_builder_class(dataset).default_config_path())
            assert OmegaConf.select(defaults.datasets[dataset], below.split(".")[0], default="none") != "none", key


@pytest.mark.parametrize("name", [name for name in RUN_FILES if not name.startswith(("demo", "easy_vqa"))])
def test_without_a_gpu_and_data_all_that_is_missing_is_told(name, monkeypatch, tmp_path):
    monkeypatch.setattr("lavis_kvmod.weights.downloads.reachable", lambda url: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError) as caught:
        load_config(path_of(name), ["env.cache_root=nothing"])
    text = str(caught.value)
    if raw(name).run.get("device", "cuda") == "cuda":
        assert "run.device: cuda, but this machine (or this PyTorch) has no CUDA" in text
    if raw(name).model.get("load_finetuned"):
        assert "finetuned: load_finetuned is true, so a checkpoint is needed here" in text
    assert all(f"datasets.{dataset}: " in text for dataset in raw(name).datasets) and "demo_vqa.yaml" in text
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- small


@pytest.fixture(scope="session")
def yours(model_config, tmp_path_factory):
    """A checkpoint by whether the prefix is on: what a run of ours has saved, and a stock one; one with another
    connector, and one of stage 1."""
    from lavis_kvmod import Blip2OPTKVMod

    folder = tmp_path_factory.mktemp("yours")
    for on in (True, False):
        torch.manual_seed(0)
        model = Blip2OPTKVMod.from_config(model_config(kv_modulation=on))
        checkpoints.save({"model": checkpoints.trained_state_dict(model)}, folder / f"{on}.pth")
    model = Blip2OPTKVMod.from_config(model_config(connector="mlp"))
    checkpoints.save({"model": checkpoints.trained_state_dict(model)}, folder / "mlp.pth")
    sizes = {key: value for key, value in model_config().items() if key in Stage1Settings.model_fields}
    sizes.update(arch="blip2_kvmod", bert_model="demo", from_bert=False, pretrained=None, load_finetuned=False)
    sizes.update(embed_dim=64)  # the demo's
    stage_1 = Blip2KVMod.from_config(sizes)
    checkpoints.save({"model": checkpoints.trained_state_dict(stage_1)}, folder / "stage1.pth")
    return folder


@pytest.fixture()
def small(benchmarks, model_config, yours, tmp_path, monkeypatch):
    """A function: the options that make a run file small, with its data in place."""
    few = {split: digits.load_scans(split)[:6] for split in digits.SPLITS}
    monkeypatch.setattr(digits, "load_scans", few.__getitem__)
    digits_data._pictures.cache_clear()
    for ask in ("get_train_questions", "get_test_questions"):
        of_few = [column[:30] for column in getattr(easy_vqa, ask)()]
        monkeypatch.setattr(easy_vqa, ask, lambda of_few=of_few: of_few)

    def options(name):
        cfg = raw(name)
        sizes = {**model_config(), "vit_model": "eva_clip_g"}
        sizes["finetuned"] = yours / f"{cfg.model.get('connector', cfg.model.get('kv_modulation', True))}.pth"
        if cfg.model.arch != "blip2_opt_kvmod":  # stage 1, from random weights
            sizes = {key: sizes[key] for key in sizes if key in SETTINGS[cfg.model.arch].model_fields}
            finetuned = yours / "stage1.pth" if cfg.model.get("load_finetuned") else "null"
            sizes.update(pretrained="null", finetuned=finetuned, bert_model="demo", from_bert=False)
        elif name.endswith("stage2.yaml") and not cfg.model.get("load_finetuned"):
            sizes["pretrained"] = yours / "stage1.pth"
        chosen = []
        for key, value in sizes.items():
            if key.endswith("geometry"):
                chosen += [f"model.{key}.{inner}={size}" for inner, size in value.items()]
            elif key not in ("arch", "load_finetuned", "opt_precision", "vit_precision"):
                chosen.append(f"model.{key}={value}")
        run = {"device": "cpu", "num_workers": 0, "max_epoch": 1, "num_beams": 2, "max_len": 6}
        run.update(batch_size_train=2, batch_size_eval=3)
        run.update(dict.fromkeys({"max_iters", "iters_per_inner_epoch"} & set(cfg.run), 4))
        chosen += [f"run.{key}={value}" for key, value in run.items()]
        if cfg.run.task == "kvmod_captioning":
            chosen.append("run.caption_metrics=[Bleu]")  # METEOR starts a JVM
        for dataset, section in cfg.datasets.items():
            section = merged(dataset, section)
            chosen += [
                f"datasets.{dataset}.vis_processor.{mode}.image_size=28" for mode in section.get("vis_processor", {})
            ]
            chosen += own_files(dataset, section, benchmarks, tmp_path)
        return chosen

    yield options
    digits_data._pictures.cache_clear()


def merged(dataset, section):
    """A data set's section over its builder's defaults."""
    defaults = registry.get_builder_class(dataset).default_config_path(type=(section or {}).get("type", "default"))
    return OmegaConf.merge(OmegaConf.load(defaults).datasets[dataset], section or {})


def own_shards(benchmarks, folder):
    """Two photographs with captions in a shard, and its index."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "0.tar", "w") as tar:
        for i, caption in ((1, "a photo of an astronaut"), (2, "a photo of a cat")):
            tar.add(benchmarks / f"coco/images/train2014/COCO_train2014_{i:012d}.jpg", f"{i}.jpg")
            text = json.dumps({"caption": caption}).encode()
            entry = tarfile.TarInfo(f"{i}.json")
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text))
    write_indices([str(folder)], None, False)
    return folder


def own_files(dataset, section, benchmarks, tmp_path):
    """Tables for the builders that read a user's own, with the columns that the run file names."""
    module = registry.get_builder_class(dataset).__module__
    if module.endswith(".shards.builders"):
        return [
            f"datasets.{dataset}.build_info.annotations.train.storage={own_shards(benchmarks, tmp_path / 'shards')}"
        ]
    if not module.endswith((".custom", ".artquest", ".retrieval", ".instruct")):
        return []
    columns = {key: (section.get("columns") or {}).get(key, key) for key in ("image", "question", "answer", "caption")}
    rows = [
        ("COCO_train2014_000000000001.jpg", "What is she?", "astronaut", "a photo of an astronaut"),
        ("COCO_train2014_000000000002.jpg", "What animal is it?", "cat", "a photo of a cat"),
        ("COCO_train2014_000000000003.jpg", "What is in the cup?", "coffee", "a photo of a cup"),
        ("COCO_train2014_000000000004.jpg", "What is taking off?", "rocket", "a photo of a rocket"),
    ]
    chosen = [f"datasets.{dataset}.build_info.images.storage={benchmarks}/coco/images/train2014"]
    for split in section.build_info.annotations:
        path = tmp_path / "own" / f"{split}.csv"
        path.parent.mkdir(exist_ok=True)
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([[str(name) for name in columns.values()], *rows])
        if dataset == "custom_instruct":
            path = path.with_suffix(".json")
            asked = [{"from": "human", "value": "<image> What is it?"}, {"from": "gpt", "value": "a cat"}]
            path.write_text(json.dumps([{"image": row[0], "conversations": asked} for row in rows]))
            chosen.append("datasets.custom_instruct.split={val: 0.5, seed: 42}")
        chosen.append(f"datasets.{dataset}.build_info.annotations.{split}.storage={path}")
    return chosen


@pytest.mark.parametrize("name", RUN_FILES)
def test_it_is_valid_once_files_and_device_are_there(name, small):
    cfg = load_config(path_of(name), small(name))
    given = raw(name)
    assert (cfg.run_cfg.runner, cfg.model_cfg.arch) == ("runner_kvmod", given.model.arch)
    assert given.model.arch in SETTINGS
    for key in ("task", "train_splits", "valid_splits", "test_splits", "amp", "accum_grad_iters", "lr_sched"):
        assert cfg.run_cfg.get(key) == given.run.get(key, run_defaults().get(key)), key  # the structure is its own


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN_FILES)
def test_it_runs(name, small, tmp_path):
    run = raw(name).run
    logs = (evaluate if run.evaluate else train)(path_of(name), small(name))
    assert set(logs or {}) == set(run.get("test_splits") or [])
    for split in logs or {}:
        assert logs[split]["agg_metrics"] >= 0
    (folder,) = (tmp_path / run.output_dir).iterdir()
    if not run.evaluate:
        saved = checkpoints.read(folder / "checkpoint_last.pth")
        assert saved["epoch"] == 0 and any(key.startswith(("kv_prefix.", "aux_tokens.")) for key in saved["model"])
    for split in run.get("test_splits") or []:
        assert list((folder / "result").glob(f"{split}_*.json"))
