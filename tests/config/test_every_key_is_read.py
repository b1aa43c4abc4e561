"""A key that is accepted is a key that something reads: runs are watched while they read their settings."""

import json

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from whole_runs import write_run  # noqa: F401

from lavis_kvmod import Blip2OPTKVMod
from lavis_kvmod.commands.launch import build_runner, load_config
from lavis_kvmod.config.keys import TABLES
from lavis_kvmod.datasets.custom import CustomCaptionBuilder, CustomVQABuilder
from lavis_kvmod.datasets.digits import DigitsCaptionBuilder
from lavis_kvmod.datasets.digits_pages import DigitsPagesBuilder
from lavis_kvmod.datasets.easy_vqa import EasyVQABuilder
from lavis_kvmod.datasets.instruct import CustomInstructBuilder
from lavis_kvmod.datasets.shards.builders import WdsVQABuilder
from lavis_kvmod.datasets.vqav2 import VQAv2Builder
from lavis_kvmod.models.blip2_kvmod import Blip2KVMod
from lavis_kvmod.models.settings import ImageSideSettings, ModelSettings, MomentumSettings, Stage1Settings
from lavis_kvmod.runners.settings import RunnerSettings
from lavis_kvmod.system import distributed
from lavis_kvmod.system.schema import Settings
from lavis_kvmod.tasks.captioning import KVModCaptionTask
from lavis_kvmod.tasks.retrieval import KVModRetrievalTask
from lavis_kvmod.tasks.settings import CaptioningSettings, RetrievalSettings, VQASettings

# What LAVIS's recipes have and LAVIS or the check of a run file handles: the reason for each.
NOT_WATCHED = {
    "arch": "decides which class is built, before anything runs",
    "model_type": "decides which defaults are merged",
    "apply_lemmatizer": "refused",
    "world_size": "written for LAVIS by what starts the processes",
    "finetuned": "read where load_finetuned is true: tests/commands/test_evaluate.py",
}


def _watched_section(original, names, paused):
    def read(self, key, *default):
        if not paused and self._key() in ("run", *SECTIONS):
            names.add(key)
        return original(self, key, *default)

    return read


# Of data sets, whose builders read them; and the tables below them.
SECTIONS = (
    "custom_vqa",
    "custom_caption",
    "custom_instruct",
    "vqav2",
    "wds_vqa",
    "digits_pages",
    "easy_vqa",
    "build_info",
    "vis_processor",
    "text_processor",
)
SECTIONS += ("images", "annotations", "questions", "train", "val")

# Handed on to the model where a run file has them.
DRAWN = dict(length_penalty=1.0, repetition_penalty=1.0, use_nucleus_sampling=True, top_p=0.5, temperature=1.0)
DRAWN["num_captions"] = 2


@pytest.fixture()
def read(monkeypatch):
    """The names of the keys that were read since the run files were checked: of `Settings`, by whoever has one, and of
    the run section itself."""
    names, paused = set(), []
    of_settings, check = Settings.__getattribute__, Settings.check.__func__

    def watched(self, name):
        if not paused:
            names.add(name)
        return of_settings(self, name)

    def unwatched_check(cls, section):  # which looks at every key
        paused.append(1)
        try:
            return check(cls, section)
        finally:
            paused.pop()

    def iterated(self):
        names.update(type(self).model_fields)
        return iter([(name, of_settings(self, name)) for name in type(self).model_fields])

    monkeypatch.setattr(Settings, "__getattribute__", watched)
    monkeypatch.setattr(Settings, "__iter__", iterated)
    monkeypatch.setattr(Settings, "check", classmethod(unwatched_check))
    for method in ("__getattr__", "__getitem__", "get"):
        monkeypatch.setattr(DictConfig, method, _watched_section(getattr(DictConfig, method), names, paused))
    return names


def test_every_key_is_read_by_a_run(write_run, read, monkeypatch):  # noqa: F811
    cfg = load_config(write_run(max_epoch=1, patience=1, resume_ckpt_path="auto"))
    captions = OmegaConf.create({"run": {"task": "kvmod_captioning", **DRAWN}})
    forward, factors = Blip2OPTKVMod.forward, [float("nan")]  # a bad step, which max_bad_steps counts

    def ill_at_first(self, samples):
        told = forward(self, samples)
        return {**told, "loss": told["loss"] * (factors.pop() if factors and self.training else 1)}

    monkeypatch.setattr(Blip2OPTKVMod, "forward", ill_at_first)
    read.clear()
    build_runner(cfg).train()
    KVModCaptionTask.setup_task(type("Config", (), {"run_cfg": captions.run, "model_cfg": cfg.model_cfg}))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **settings: None)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    distributed.init_distributed(cfg.run_cfg)
    of_these_runs = (ModelSettings, RunnerSettings, VQASettings, CaptioningSettings)
    declared = {key.name for settings in of_these_runs for key in settings.keys()}
    declared.remove("bert_model")  # where the Q-Former reads questions: tests/models/test_question_in_the_qformer.py
    assert declared - read - set(NOT_WATCHED) == set()


def test_every_key_of_stage_1_is_read(read, model_config, tmp_path, monkeypatch):
    """By what builds its model and its task; those that all models share are watched above. Each objective's weight is
    one of the losses in tests/models/test_blip2_kvmod.py."""
    monkeypatch.setenv("LAVIS_KVMOD_CACHE", str(tmp_path))
    shared = {key: value for key, value in model_config().items() if key in ImageSideSettings.model_fields}
    own = {"arch": "blip2_kvmod", "bert_model": "demo", "from_bert": False, "momentum": {"queue": 8}}
    settings = Stage1Settings.from_config({**shared, **own, "pretrained": None})
    read.clear()
    Blip2KVMod.from_settings(settings)
    KVModRetrievalTask.setup_task(type("Config", (), {"run_cfg": OmegaConf.create({"k_test": 3})}))
    of_stage_1 = [*Stage1Settings.keys(inherited=False), *MomentumSettings.keys(), *RetrievalSettings.keys()]
    assert {key.name for key in of_stage_1} - read - set(NOT_WATCHED) == set()


# What no builder reads: LAVIS has it before it asks one, or for people.
NOT_BUILDERS = {
    "frames": "read where a row has a video: tests/datasets/test_video.py",
    "frames_by": "the same",
    "type": "decides which defaults are merged",
    "dataset_card": "for people",
    "md5": "LAVIS's own download reads it",
    "eval": "processors are looked up by LAVIS with eval()",
}


def sections_of(builder, **build_info):
    """A builder's default section, with these files."""
    (section,) = OmegaConf.load(builder.default_config_path()).datasets.values()
    OmegaConf.update(section, "build_info", build_info, force_add=True)
    return section


def test_every_key_of_a_data_set_is_read_by_its_builder(read, write_run, benchmarks, tmp_path):  # noqa: F811
    told = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "that"}]
    row = {"question": "what is it?", "answer": "yes", "caption": "no", "conversations": told}
    rows = [{"image": f"{i}.png", **row} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = {"images": {"storage": str(tmp_path / "data")}, "annotations": {"train": str(tmp_path / "rows.jsonl")}}
    shards = OmegaConf.load(write_run(dataset="wds_vqa")).datasets.wds_vqa
    official = sections_of(VQAv2Builder)
    official.build_info.annotations = {split: official.build_info.annotations[split] for split in ("train", "val")}
    read.clear()
    for builder, section in (
        (CustomVQABuilder, sections_of(CustomVQABuilder, **own)),
        (CustomCaptionBuilder, sections_of(CustomCaptionBuilder, **own)),
        (CustomInstructBuilder, sections_of(CustomInstructBuilder, **own)),
        (VQAv2Builder, official),
        (WdsVQABuilder, OmegaConf.merge(sections_of(WdsVQABuilder), shards)),
        (DigitsPagesBuilder, sections_of(DigitsPagesBuilder)),
        (DigitsCaptionBuilder, sections_of(DigitsCaptionBuilder)),
        (EasyVQABuilder, sections_of(EasyVQABuilder)),
    ):
        assert "train" in builder(section).build_datasets()
    tables = [table.declared for table in TABLES.values() if table.section == "datasets"]
    declared = {key.name for table in tables for key in table.keys()}
    assert declared - read - set(NOT_BUILDERS) == set()
