"""Counting without weights."""

import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from lavis_kvmod import Blip2OPTKVMod

# Measured on the real modules; OPT as published (its output layer is its embedding, counted once).
PUBLISHED = {
    "visual_encoder": 985_894_528,
    "ln_vision": 2_816,
    "aux_encoder": 10_696_232,
    "kv_prefix": 4_728_576,
    "query_tokens": 24_576,
    "Qformer": 105_137_664,
    "opt_proj": 1_968_640,
    "opt_model": 2_651_596_800,
}


def test_published_sizes_without_memory():
    cfg = OmegaConf.load(Blip2OPTKVMod.default_config_path("pretrain_opt2.7b")).model
    model = Blip2OPTKVMod.without_weights(cfg)
    assert {row.part: row.parameters for row in model.parts()} == PUBLISHED
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {row.part: row.bytes for row in model.parts()}["opt_model"] == 2 * PUBLISHED["opt_model"]


def test_counts_are_those_of_the_loaded_model(build, model_config):
    for overrides in ({}, {"prefix_gate": "tanh", "prefix_sharing": "per_layer"}, {"kv_modulation": False}):
        assert Blip2OPTKVMod.without_weights(model_config(**overrides)).parts() == build(**overrides).parts()


def test_the_command_prints_the_table():
    command = [sys.executable, "-m", "lavis_kvmod", "params", "--cfg-path", "projects/kvmod/vqa.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    for name, count in PUBLISHED.items():
        (row,) = [line for line in done.stdout.splitlines() if line.split()[0] == name]
        assert f" {count:,} " in row
        assert ("trained" in row) == (name in ("kv_prefix", "query_tokens", "Qformer", "opt_proj"))


def test_an_unknown_size_is_said():
    with pytest.raises(FileNotFoundError, match="facebook/opt-2.7b"):
        Blip2OPTKVMod.without_weights({"load_finetuned": False, "opt_model": "someone/opt-odd"})
