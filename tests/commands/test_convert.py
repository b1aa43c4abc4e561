"""Checkpoints between LAVIS's layout and Hugging Face's: the same numbers, all of them, or nothing at all.

That Hugging Face's model then computes the same is what `make parity` shows.
"""

import hashlib
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lavis_kvmod.commands import cli
from lavis_kvmod.commands import convert as command
from lavis_kvmod.commands.convert import convert
from lavis_kvmod.weights import files as checkpoints
from lavis_kvmod.weights import reading, tensors
from lavis_kvmod.weights.files import CheckpointError
from lavis_kvmod.weights.finding import MissingWeightsError

HEADS = dict(vit_heads=4, qformer_heads=4)
SHARD = 100_000  # some shards of what the small model is


def towers(files):
    return dict(vit=str(files.vit), opt=str(files.opt))


@pytest.fixture()
def hf_folder(files, tmp_path):
    """The small stock BLIP-2 as a Hugging Face folder in shards."""
    convert(files.blip2, tmp_path / "hf", **towers(files), **HEADS, shard_bytes=SHARD)
    return tmp_path / "hf"


def read_all(files):
    """All of the stock model, under LAVIS's names."""
    state = reading.read_weights(files.blip2)
    vit = {f"visual_encoder.{k}": v for k, v in reading.read_weights(files.vit).items()}
    opt = {f"opt_model.{k}": v for k, v in checkpoints.read(files.opt / "pytorch_model.bin").items()}
    return {**state, **vit, **opt}


def assert_same(got, expected):
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert got[name].dtype == value.dtype and torch.equal(got[name], value), name


# ------------------------------------------------------------------ the same numbers


def test_there_and_back_is_equal_bit_for_bit(files, stock, hf_folder, tmp_path):
    expected = read_all(files)
    assert len(list(hf_folder.glob("model-*-of-*.safetensors"))) > 2
    convert(hf_folder, tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert_same(back, expected)
    # LAVIS's own class takes it without a word, and its tied weights take no room twice
    stock.load_state_dict(back)
    assert back["opt_model.lm_head.weight"].data_ptr() == back["opt_model.model.decoder.embed_tokens.weight"].data_ptr()

    convert(tmp_path / "back.pth", tmp_path / "again.safetensors")
    convert(tmp_path / "again.safetensors", tmp_path / "again")  # what it needs to know is in the file
    assert_same(load_file(tmp_path / "again" / "model.safetensors"), hf_tensors(hf_folder))
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == config_of(hf_folder)


def hf_tensors(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found.update(load_file(file))
    return found


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_the_folder_is_laid_out_as_hugging_face_does(files, hf_folder):
    found, state = hf_tensors(hf_folder), read_all(files)
    index = json.loads((hf_folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(found)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    block = "visual_encoder.blocks.1.attn."
    bias = torch.cat([state[block + "q_bias"], torch.zeros(32), state[block + "v_bias"]])
    assert torch.equal(found["vision_model.encoder.layers.1.self_attn.qkv.bias"], bias)
    for theirs, ours in {
        "vision_model.embeddings.class_embedding": "visual_encoder.cls_token",
        "vision_model.post_layernorm.weight": "ln_vision.weight",
        "qformer.layernorm.bias": "Qformer.bert.embeddings.LayerNorm.bias",
        "qformer.encoder.layer.2.crossattention.attention.key.weight": (
            "Qformer.bert.encoder.layer.2.crossattention.self.key.weight"
        ),
        "language_projection.weight": "opt_proj.weight",
        "language_model.model.decoder.layers.0.fc1.weight": "opt_model.model.decoder.layers.0.fc1.weight",
    }.items():
        assert torch.equal(found[theirs], state[ours])
    assert not [n for n in found if "lm_head" in n or "position_ids" in n]  # tied; not Hugging Face's

    config = config_of(hf_folder)
    assert (config["model_type"], config["num_query_tokens"], config["torch_dtype"]) == ("blip-2", 5, "float32")
    vision, qformer = config["vision_config"], config["qformer_config"]
    assert (vision["layer_norm_eps"], qformer["layer_norm_eps"]) == (1e-6, 1e-12)
    assert (vision["image_size"], vision["patch_size"], vision["num_hidden_layers"]) == (28, 14, 2)
    assert (qformer["cross_attention_frequency"], qformer["encoder_hidden_size"]) == (2, 32)
    assert config["text_config"]["num_attention_heads"] == 4
    assert "_name_or_path" not in config["text_config"]
    assert (hf_folder / "vocab.json").read_bytes() == (files.opt / "vocab.json").read_bytes()


def test_the_published_number_of_heads_is_found():
    assert command.hf_folders._heads("--vit-heads", "image encoder", 1408, 88, None) == 16
    assert command.hf_folders._heads("--qformer-heads", "Q-Former", 768, 64, None) == 12


def test_a_finetuned_file_takes_the_rest_from_its_base(build, files, hf_folder, tmp_path):
    model = build(kv_modulation=False, seed=3)
    with torch.no_grad():
        model.opt_proj.weight.add_(1.0)
    checkpoints.save({"model": checkpoints.trained_state_dict(model)}, tmp_path / "ours.pth")
    convert(tmp_path / "ours.pth", tmp_path / "tuned", base=hf_folder)
    changed = {k for k, v in hf_tensors(tmp_path / "tuned").items() if not torch.equal(v, hf_tensors(hf_folder)[k])}
    assert changed == {"language_projection.weight"}


@pytest.mark.parametrize(
    "page, count, folders",
    [("checkpoints.md", 5, ["blip2-again", "mine", "tuned"]), ("coming_from_huggingface.md", 2, ["tuned"])],
)
def test_the_documented_commands_work(build, files, hf_folder, tmp_path, monkeypatch, page, count, folders):
    text = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8")
    commands = re.findall(r"^lavis-kvmod (convert .*)$", text, re.MULTILINE)
    assert len(commands) == count
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command.hf_folders, "VIT_HEAD_WIDTH", 8)  # the small model's heads
    monkeypatch.setattr(command.hf_folders, "QFORMER_HEAD_WIDTH", 8)
    hf_folder.rename("blip2-opt-2.7b")
    shutil.copy(files.blip2, "blip2_pretrained_opt2.7b.pth")
    shutil.copy(files.vit, "eva_vit_g.pth")
    shutil.copytree(files.opt, "opt-2.7b")
    checkpoints.save({"model": checkpoints.trained_state_dict(build())}, "checkpoint_best.pth")
    for line in commands:
        assert cli.main(shlex.split(line, comments=True)) == 0, line
    # The rest of the model is the same; what was trained is the base's, whose weights this one still has.
    for folder in folders:
        assert_same(hf_tensors(Path(folder)), hf_tensors(Path("blip2-opt-2.7b")))
        assert config_of(Path(folder))["vision_config"]["num_attention_heads"] == 4


def test_an_output_embedding_of_its_own_is_kept(files, tmp_path):
    """Written twice, equal numbers are one tensor to Hugging Face; other numbers are not lost."""
    state = read_all(files)
    embedding = state["opt_model.model.decoder.embed_tokens.weight"]
    for folder, head in {"equal": embedding.clone(), "other": embedding + 1}.items():
        torch.save({"model": {**state, "opt_model.lm_head.weight": head}}, tmp_path / "whole.pth")
        convert(tmp_path / "whole.pth", tmp_path / folder, opt=files.opt, **HEADS)
        kept = hf_tensors(tmp_path / folder).get("language_model.lm_head.weight")
        assert config_of(tmp_path / folder)["text_config"]["tie_word_embeddings"] is (folder == "equal")
        assert kept is None if folder == "equal" else torch.equal(kept, head)


def test_half_precision_stays(files, tmp_path):
    vit = {k: v.half() if v.ndim > 1 else v.bfloat16() for k, v in reading.read_weights(files.vit).items()}
    torch.save(vit, tmp_path / "vit.pth")
    convert(files.blip2, tmp_path / "hf", vit=tmp_path / "vit.pth", opt=files.opt, **HEADS)
    convert(tmp_path / "hf", tmp_path / "back.pth")
    back = reading.read_weights(tmp_path / "back.pth")
    assert_same({k[len("visual_encoder.") :]: v for k, v in back.items() if k.startswith("visual_encoder.")}, vit)


def test_an_image_encoder_file_may_hold_more(files, tmp_path, monkeypatch):
    """LAVIS's EVA file: one block more than BLIP-2 uses, and a head."""
    vit = reading.read_weights(files.vit)
    more = {k.replace("blocks.1.", "blocks.2."): v for k, v in vit.items() if k.startswith("blocks.1.")}
    torch.save({**vit, **more, "head.weight": torch.zeros(3, 32), "norm.bias": torch.zeros(32)}, tmp_path / "eva.pth")
    monkeypatch.setattr(command, "_EVA_CLIP_G_WIDTH", 32)
    monkeypatch.setattr(command, "_EVA_CLIP_G_BLOCKS", 2)
    convert(files.blip2, tmp_path / "eva", vit=tmp_path / "eva.pth", opt=files.opt, **HEADS)
    convert(files.blip2, tmp_path / "plain", vit=files.vit, opt=files.opt, **HEADS)
    assert_same(hf_tensors(tmp_path / "eva"), hf_tensors(tmp_path / "plain"))


# ------------------------------------------------------------------ loading


def as_bin(folder, to, shards):
    to.mkdir()
    shutil.copy(folder / "config.json", to)
    state = hf_tensors(folder)
    if shards == 1:
        torch.save(state, to / "pytorch_model.bin")
        return to
    names = sorted(state)
    weight_map = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        torch.save({name: state[name] for name in names if weight_map[name] == file}, to / file)
    (to / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return to


@pytest.mark.parametrize("layout", ["shards", "safetensors", "hf names", "bin", "bin shards"])
def test_every_layout_gives_the_same_soft_prompt(build, files, hf_folder, tmp_path, images, layout):
    batch = {"image": images(2)}
    expected = build(kv_modulation=False).eval().encode(batch).soft_prompt
    if layout == "safetensors":
        source = tmp_path / "lavis.safetensors"
        save_file({k: v.contiguous() for k, v in reading.read_weights(files.blip2).items()}, str(source))
    elif layout == "hf names":
        source = tmp_path / "one.safetensors"
        save_file(hf_tensors(hf_folder), str(source))
    elif layout.startswith("bin"):
        source = as_bin(hf_folder, tmp_path / "bin", 2 if "shards" in layout else 1)
    else:
        source = hf_folder
    model = build(kv_modulation=False, seed=5, pretrained=str(source)).eval()
    assert torch.equal(model.encode(batch).soft_prompt, expected)
    other = build(seed=6, pretrained=None, load_finetuned=False)  # and beside a prefix, as `checkpoint=`
    report = other.load_checkpoint(str(source))
    frozen = {"visual_encoder", "opt_model"} if layout == "safetensors" else set()
    assert {key.split(".")[0] for key in report.missing_keys} == {"kv_prefix", "aux_encoder"} | frozen


def test_a_folder_brings_its_own_towers(build, files, hf_folder, tmp_path, images):
    other = {k: v + 0.1 * torch.randn_like(v) for k, v in reading.read_weights(files.vit).items()}
    torch.save(other, tmp_path / "other.pth")
    batch = {"image": images(2)}
    expected = build(kv_modulation=False).eval().encode(batch).soft_prompt
    replaced = dict(kv_modulation=False, vit_checkpoint=str(tmp_path / "other.pth"))
    assert not torch.allclose(build(**replaced).eval().encode(batch).soft_prompt, expected)
    model = build(**replaced, pretrained=str(hf_folder)).eval()
    assert torch.equal(model.encode(batch).soft_prompt, expected)
    # the folder also serves as the image encoder's file
    model = build(kv_modulation=False, vit_checkpoint=str(hf_folder)).eval()
    assert torch.equal(model.encode(batch).soft_prompt, expected)


def test_a_folder_fits_another_image_size(build, hf_folder):
    """Its position embedding is interpolated as that of an image encoder's file is."""
    larger = dict(kv_modulation=False, image_size=42)
    expected = build(**larger, vit_checkpoint=str(hf_folder)).visual_encoder.pos_embed
    found = build(**larger, pretrained=str(hf_folder)).visual_encoder.pos_embed
    assert found.shape == (1, 10, 32) and torch.equal(found, expected)


def test_rows_for_an_image_token_are_left_out(build, hf_folder, tmp_path):
    """Hugging Face's current folders have rows beyond OPT's vocabulary."""
    state = hf_tensors(hf_folder)
    name = "language_model.model.decoder.embed_tokens.weight"
    rows = state[name]
    state[name] = torch.cat([rows, torch.randn(32, 32)])
    save_file(state, str(tmp_path / "more.safetensors"))
    model = build(pretrained=None)
    model.load_checkpoint(str(tmp_path / "more.safetensors"))
    assert torch.equal(model.opt_model.lm_head.weight, rows)
    state[name] = rows[:-1]
    save_file(state, str(tmp_path / "fewer.safetensors"))
    with pytest.raises(CheckpointError, match=r"2 of another shape:\n    opt_model.model.decoder.embed_tokens.weight"):
        model.load_checkpoint(str(tmp_path / "fewer.safetensors"))


@pytest.mark.parametrize("target", ["back.pth", "back.safetensors"])
def test_lavis_takes_what_is_converted_with_rows_for_an_image_token(
    files, stock, hf_folder, tmp_path, monkeypatch, target
):
    expected = read_all(files)
    rows = len(expected["opt_model.model.decoder.embed_tokens.weight"])
    monkeypatch.setattr(command.hf_names, "OPT_ROWS", rows)
    state = hf_tensors(hf_folder)
    name = "language_model.model.decoder.embed_tokens.weight"
    state[name] = torch.cat([state[name], torch.randn(32, 32)])
    save_file(state, str(tmp_path / "more.safetensors"))
    convert(tmp_path / "more.safetensors", tmp_path / target)
    back = reading.read_weights(tmp_path / target)
    if target == "back.safetensors":  # holds nothing twice
        back["opt_model.lm_head.weight"] = back["opt_model.model.decoder.embed_tokens.weight"]
    assert_same(back, expected)
    stock.load_state_dict(back)
    assert (tmp_path / target).stat().st_size < 1.05 * sum(v.nbytes for v in expected.values())  # still tied


def test_a_folder_that_computes_otherwise_is_told_or_refused(hf_folder, caplog, tmp_path):
    config = config_of(hf_folder)

    def with_config(changed):
        (hf_folder / "config.json").write_text(json.dumps(changed))
        return reading.read_weights(hf_folder)

    with_config({**config, "vision_config": {**config["vision_config"], "layer_norm_eps": 1e-5}})
    assert "vision_config.layer_norm_eps is 1e-05, but LAVIS computes with 1e-06" in caplog.text
    with pytest.raises(
        CheckpointError, match="expected vision_config.hidden_act gelu, as LAVIS has it, got quick_gelu"
    ):
        with_config({**config, "vision_config": {**config["vision_config"], "hidden_act": "quick_gelu"}})
    with pytest.raises(CheckpointError, match="expected a blip-2 config with an opt text_config, got blip-2, t5"):
        with_config({**config, "text_config": {"model_type": "t5"}})
    (hf_folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="config.json: expected a table, got list"):
        reading.read_weights(hf_folder)
    (hf_folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json is not JSON"):
        reading.read_weights(hf_folder)
    (hf_folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="is not a Hugging Face folder: it has no config.json"):
        reading.read_weights(hf_folder)


def test_a_folder_that_is_not_whole(hf_folder, files, tmp_path):
    shards = sorted(hf_folder.glob("model-*.safetensors"))
    index = hf_folder / "model.safetensors.index.json"
    whole = {path: path.read_bytes() for path in [*shards, index]}

    def refused(match, error=CheckpointError):
        with pytest.raises(error, match=match):
            reading.read_weights(hf_folder)
        with pytest.raises(error, match=match):
            convert(hf_folder, tmp_path / "x.pth")
        assert not list(tmp_path.glob("*x.pth*"))
        for path, content in whole.items():
            path.write_bytes(content)

    shards[1].write_bytes(whole[shards[1]][:-100])
    refused(f"{shards[1].name} is not a readable safetensors file")
    shards[1].unlink()
    refused(f"no such checkpoint: .*{shards[1].name}", FileNotFoundError)
    shutil.copy(shards[0], shards[1])
    refused(r"its files lack what its index names(.*\n)+.* missing:\n")
    index.write_text(json.dumps({"weight_map": {"query_tokens": "../elsewhere.safetensors"}}))
    refused(r'index.json: expected \{"weight_map": \{tensor: file of this folder')
    index.unlink()
    refused("no weights in .*: expected model.safetensors or pytorch_model.bin", FileNotFoundError)


# ------------------------------------------------------------------ what is refused


def test_a_prefix_is_refused_or_dropped(build, files, hf_folder, tmp_path):
    model = build(prefix_gate="tanh")
    checkpoints.save({"model": checkpoints.trained_state_dict(model)}, tmp_path / "ours.pth")
    with pytest.raises(CheckpointError, match=r"no place for one; with --drop-prefix(.*\n)+.*kv_gate\n.*kv_prefix"):
        convert(tmp_path / "ours.pth", tmp_path / "x", base=hf_folder)
    convert(tmp_path / "ours.pth", tmp_path / "x", base=hf_folder, drop_prefix=True)
    assert_same(hf_tensors(tmp_path / "x"), hf_tensors(hf_folder))
    convert(tmp_path / "ours.pth", tmp_path / "ours.safetensors")  # our own names have a place for it
    assert_same(reading.read_weights(tmp_path / "ours.safetensors"), checkpoints.trained_state_dict(model))


def test_an_image_encoder_without_blocks_is_not_whole(files, tmp_path):
    vit = {k: v for k, v in reading.read_weights(files.vit).items() if not k.startswith("blocks.")}
    torch.save(vit, tmp_path / "vit.pth")
    with pytest.raises(CheckpointError, match=r"is not whole:\n  .* missing:\n    visual_encoder.blocks.0."):
        convert(files.blip2, tmp_path / "x", vit=tmp_path / "vit.pth", opt=files.opt, **HEADS)


def test_what_a_folder_needs_is_named(files, tmp_path):
    def refused(match, source=files.blip2, error=CheckpointError, **options):
        with pytest.raises(error, match=match):
            convert(source, tmp_path / "x", **options)
        assert not list(tmp_path.glob("*x*"))

    def changed(change):
        state = reading.read_weights(files.blip2)
        change(state)
        torch.save({"model": state}, tmp_path / "changed.pth")
        return tmp_path / "changed.pth"

    refused(r"lacks parts.*\n  - visual_encoder: give --vit FILE.*\n  - opt_model: give --opt FOLDER")
    refused("- ln_vision: give --base", changed(lambda s: [s.pop(f"ln_vision.{k}") for k in ("weight", "bias")]))
    lacks = changed(lambda s: s.pop("Qformer.bert.encoder.layer.2.crossattention.self.value.bias"))
    refused(r"1 missing:\n    Qformer.*2.crossattention.self.value.bias", lacks, **towers(files), **HEADS)
    text = changed(lambda s: s.update({"Qformer.bert.embeddings.word_embeddings.weight": torch.zeros(2, 2)}))
    refused("no counterpart of\n.*1 tensors:\n.*word_embeddings", text, **towers(files), **HEADS)
    refused("expected --vit-heads N, a divisor of its width 32, got none", **towers(files))
    refused("expected --qformer-heads N, .* got 5", **towers(files), vit_heads=4, qformer_heads=5)
    refused("no image encoder of LAVIS's", vit=files.b0, opt=files.opt)
    refused("expected the folder of an OPT model, got None", vit=files.vit, opt=bert_folder(tmp_path))
    refused("SRC: no such file", tmp_path / "missing.pth", MissingWeightsError)
    torch.save(read_all(files), tmp_path / "whole.pth")
    refused("does not say what its language model is; give --opt", tmp_path / "whole.pth", **HEADS)
    torch.save({"model": {"query_tokens": torch.zeros(1, dtype=torch.complex64)}}, tmp_path / "strange.pth")
    refused("query_tokens is torch.complex64; expected one of", tmp_path / "strange.pth")


def bert_folder(tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text("{}")
    return tmp_path / "bert"


def test_a_config_of_another_model_is_refused(build, files, hf_folder, tmp_path):
    config = config_of(hf_folder)
    config["text_config"]["num_hidden_layers"] = 7
    (hf_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="text_config.num_hidden_layers is 7, but the weights have 2"):
        convert(hf_folder, tmp_path / "x")
    assert not list(tmp_path.glob("*x*"))


def test_what_is_there_is_not_written_over(files, hf_folder, tmp_path, capsys):
    (tmp_path / "there.pth").write_text("mine")
    for name in ("there.pth", "hf"):
        with pytest.raises(ValueError, match=f"{name} is there already; remove it"):
            convert(files.blip2, tmp_path / name)
    with pytest.raises(ValueError, match="expected a path ending in .pth or .safetensors, or that of a folder; got"):
        convert(files.blip2, tmp_path / "x.bin")
    assert (tmp_path / "there.pth").read_text() == "mine"
    assert cli.main(["convert", str(files.blip2), str(tmp_path / "there.pth")]) == 2
    assert "error: DST" in capsys.readouterr().err


def test_unknown_names_of_hugging_face(hf_folder, tmp_path):
    state = {**hf_tensors(hf_folder), "itm_head.weight": torch.zeros(1)}
    save_file(state, str(tmp_path / "itm.safetensors"))
    with pytest.raises(CheckpointError, match="LAVIS's BLIP-2 OPT has no counterpart of\n.*\n    itm_head.weight"):
        reading.read_weights(tmp_path / "itm.safetensors")


# ------------------------------------------------------------------ whole or nothing


@pytest.mark.parametrize("target", ["x.pth", "x.safetensors", "x"])
def test_an_interrupted_conversion_leaves_nothing(files, tmp_path, monkeypatch, capsys, target):
    reads = []

    def interrupt(self, *args):
        if len(reads) == 60:
            raise KeyboardInterrupt
        reads.append(args)
        return read(self, *args)

    read = tensors.TensorFiles._read
    monkeypatch.setattr(tensors.TensorFiles, "_read", interrupt)
    argv = ["convert", files.blip2, tmp_path / target, "--vit", files.vit, "--opt", files.opt]
    argv += ["--vit-heads", 4, "--qformer-heads", 4, "--shard-gb", SHARD / 1e9]
    assert cli.main([str(arg) for arg in argv]) == 130
    assert "interrupted: nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert cli.main([str(arg) for arg in argv]) == 0
    shown = capsys.readouterr()
    assert "100%" in shown.err and f"wrote {tmp_path / target}" in shown.out
    assert [path.name for path in tmp_path.iterdir()] == [target]


# ------------------------------------------------------------------ sha256


def test_a_sha256_beside_a_path_is_checked(build, files, hf_folder, tmp_path):
    def sha256(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()

    keys = {"pretrained": files.blip2, "vit_checkpoint": files.vit, "aux_checkpoint": files.b0}
    build(**{key: f"{path}#sha256={sha256(path).upper()}" for key, path in keys.items()})
    for key, path in keys.items():
        with pytest.raises(
            CheckpointError, match=f"{path.name} is not the file.*expected sha256 0{{64}}, got {sha256(path)}"
        ):
            build(**{key: f"{path}#sha256={'0' * 64}"})
    with pytest.raises(
        MissingWeightsError, match="expected 64 hexadecimal digits behind .*blip2.pth#sha256=, got 'abc'"
    ):
        build(pretrained=f"{files.blip2}#sha256=abc")
    with pytest.raises(CheckpointError, match="but this is a folder"):
        build().load_checkpoint(f"{hf_folder}#sha256={'0' * 64}")
    convert(f"{files.blip2}#sha256={sha256(files.blip2)}", tmp_path / "good.safetensors")
    with pytest.raises(CheckpointError, match="is not the file"):
        convert(f"{files.blip2}#sha256={'1' * 64}", tmp_path / "bad.safetensors")
    assert not list(tmp_path.glob("*bad*"))


def test_a_sha256_beside_a_url(served, tmp_path):
    there, url = served.folder / "there.pth", f"{served.url}/there.pth"
    torch.save({"model": {"a": torch.zeros(2)}}, there)
    convert(f"{url}#sha256={hashlib.sha256(there.read_bytes()).hexdigest()}", tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="there.pth is not the file"):
        convert(f"{url}#sha256={'0' * 64}", tmp_path / "b.safetensors")


# ------------------------------------------------------------------ memory

MEASURED = r"""
import re, sys
from lavis_kvmod.commands import convert as command

def peak():  # getrusage would count what the process that started this one held
    return int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) * 1024

command.convert({small!r}, {small!r} + ".out" + {suffix!r})  # what a first conversion imports
before = peak()
command.convert(sys.argv[1], sys.argv[2])
print(peak() - before)
"""


def big_file(path):
    """200 MiB: OPT's embeddings, tied, of 64 MiB, and layers."""
    embeddings = torch.randn(2**13, 2**11)
    layers = {f"opt_model.model.decoder.layers.{i}.fc1.weight": torch.randn(2**11, 2**11) for i in range(8)}
    state = {
        "opt_model.model.decoder.embed_tokens.weight": embeddings,
        **layers,
        "opt_model.lm_head.weight": embeddings,
    }
    torch.save({"model": state}, path)
    return embeddings.nbytes


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("source, target", [(".pth", ".safetensors"), (".safetensors", ".pth"), (".pth", ".pth")])
def test_peak_memory_is_about_the_largest_tensor(tmp_path, source, target):
    largest = big_file(tmp_path / "big.pth")
    if source != ".pth":
        convert(tmp_path / "big.pth", tmp_path / f"big{source}")
    torch.save({"model": {"a": torch.zeros(2)}}, tmp_path / "small.pth")
    script = MEASURED.format(small=str(tmp_path / "small.pth"), suffix=target)
    argv = [sys.executable, "-c", script, str(tmp_path / f"big{source}"), str(tmp_path / f"out{target}")]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert 0.9 * largest < int(done.stdout) < 1.3 * largest
    got, expected = (reading.read_weights(tmp_path / name) for name in (f"out{target}", f"big{source}"))
    if target == ".safetensors":
        del expected["opt_model.lm_head.weight"]  # a safetensors file holds nothing twice
    assert_same(got, expected)


@pytest.mark.slow
def test_a_conversion_that_is_asked_to_end_leaves_nothing(tmp_path):
    big_file(tmp_path / "big.pth")
    argv = [sys.executable, "-m", "lavis_kvmod", "convert", str(tmp_path / "big.pth"), str(tmp_path / "x.safetensors")]
    running = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".x.*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.001)
    running.send_signal(signal.SIGTERM)
    assert re.search("nothing was written", running.communicate(timeout=60)[1])
    assert running.returncode == 130
    assert [path.name for path in tmp_path.iterdir()] == ["big.pth"]
