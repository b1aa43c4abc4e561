"""A key that is accepted is a key that something reads: runs are watched while they read their settings."""

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from whole_runs import write_run  # noqa: F401

from lavis_kvmod import Blip2OPTKVMod
from lavis_kvmod.commands.launch import build_runner, load_config
from lavis_kvmod.models.settings import ModelSettings
from lavis_kvmod.runners.settings import RunnerSettings
from lavis_kvmod.system import distributed
from lavis_kvmod.system.schema import Settings
from lavis_kvmod.tasks.captioning import KVModCaptionTask
from lavis_kvmod.tasks.settings import CaptioningSettings, VQASettings

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
        if not paused and self._key() == "run":
            names.add(key)
        return original(self, key, *default)

    return read


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

    monkeypatch.setattr(Settings, "__getattribute__", watched)
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
    assert declared - read - set(NOT_WATCHED) == set()
