"""Counting without weights."""

import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from lavis_kvmod import Blip2OPTKVMod
from lavis_kvmod.commands import cli
from lavis_kvmod.models.connectors.qformer import QFormer
from lavis_kvmod.models.empty import empty_weights

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


def printed_here(capsys):
    assert cli.main(["params", "--cfg-path", "projects/kvmod/vqa.yaml"]) == 0
    return capsys.readouterr().out


def printed_alone(capsys):
    # Deprecations of LAVIS's pinned dependencies would fill the screen first.
    command = [sys.executable, "-W", "default", "-m", "lavis_kvmod", "params", "--cfg-path", "projects/kvmod/vqa.yaml"]
    script = (
        f"import resource, subprocess\nsubprocess.run({command!r}, check=True)\n"
        "print('peak', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20)"
    )
    done = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert "FutureWarning" not in done.stderr
    return done.stdout


@pytest.mark.parametrize("printed", [printed_here, pytest.param(printed_alone, marks=pytest.mark.slow)])
def test_the_command_prints_the_table_alone_without_allocating_weights(printed, capsys):
    rows = {line.split()[0]: line.split() for line in printed(capsys).splitlines()}
    assert rows["part"] == ["part", "parameters", "state", "dtype", "bytes"]
    for name, count in PUBLISHED.items():
        _, parameters, state, dtype, size = rows[name]
        assert parameters == f"{count:,}"
        assert state == ("trained" if name in ("kv_prefix", "query_tokens", "Qformer", "opt_proj") else "frozen")
        assert dtype == {"opt_model": "bfloat16", "visual_encoder": "bfloat16+float32"}.get(name, "float32")
        if name != "visual_encoder":
            assert size == f"{count * (2 if name == 'opt_model' else 4):,}"
    if "peak" in rows:
        assert float(rows["peak"][1]) < 2  # the libraries' own; the weights alone are 7.4 GiB


def test_round_figures_of_the_design_are_met_by_the_whole_networks():
    """EfficientNet-B3 with its classifier, and the Q-Former with its text side, to which LAVIS adds BERT's head."""
    from efficientnet_pytorch import EfficientNet
    from lavis.models.blip2_models.Qformer import BertConfig, BertLMHeadModel

    config = BertConfig(vocab_size=30523)
    config.encoder_width, config.add_cross_attention = 1408, True
    config.cross_attention_freq, config.query_length = 2, 32
    with empty_weights():
        b3 = EfficientNet.from_name("efficientnet-b3")
        ours = QFormer(encoder_width=1408, num_queries=32, vocab_size=30523)
        stock = BertLMHeadModel(config)
    assert sum(p.numel() for p in b3.parameters()) == 12_233_232
    assert sum(p.numel() for p in ours.parameters()) == 185_660_160
    assert sum(p.numel() for p in stock.bert.parameters()) == 185_660_160
    head = (stock.cls.predictions.transform, stock.cls.predictions.bias)
    assert 185_660_160 + sum(p.numel() for p in (*head[0].parameters(), head[1])) == 186_282_811


@pytest.mark.parametrize(
    "options, told",
    [
        (["--cfg-path", "nowhere.yaml"], "nowhere.yaml"),
        (["--cfg-path", "broken.yaml"], "broken.yaml(.*\\n)*.*not valid YAML"),
        (["--cfg-path", "projects/kvmod/vqa.yaml", "--options", "model.arch=blip3"], "'blip3' is not known"),
        (["--options", "model.vit_geometry=3"], "vit_geometry: expected a table of sizes, got 3"),
        (["--options", "model.qformer_geometry=[1]"], r"qformer_geometry: expected a table of sizes, got \[1\]"),
    ],
)
def test_the_command_says_what_is_wrong(tmp_path, monkeypatch, options, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.yaml").write_text("model: {arch: [")
    with pytest.raises(SystemExit, match=f"error: (.*\\n)*.*{told}"):
        cli.main(["params", *options])


def test_an_unknown_size_is_said():
    with pytest.raises(FileNotFoundError, match="facebook/opt-2.7b"):
        Blip2OPTKVMod.without_weights({"load_finetuned": False, "opt_model": "someone/opt-odd"})
