from pathlib import Path

import pytest
import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf

from lavis_kvmod.commands import train
from lavis_kvmod.config.loading import load_config
from lavis_kvmod.models.settings import ModelSettings, SettingsError, settings_of
from lavis_kvmod.runners.runner_kvmod import RunnerKVMod
from lavis_kvmod.system.paths import resource
from lavis_kvmod.system.schema import ConfigurationError

DEMO = "projects/kvmod/demo_vqa.yaml"
ALL_YAML = sorted(
    str(path.relative_to(resource(folder).parent))
    for folder in ("configs", "projects")
    for path in resource(folder).rglob("*.yaml")
)


def problems(options=(), path=DEMO):
    with pytest.raises(ConfigurationError) as caught:
        load_config(path, list(options))
    return caught.value.problems


@pytest.mark.parametrize("path", ALL_YAML)
def test_every_yaml_loads(path, monkeypatch):
    """Run files pass every check but those of this machine (GPU, data, downloads); defaults are valid sections."""
    cfg = OmegaConf.load(resource(path))
    if path.startswith("configs/models"):
        settings_of(cfg.model).from_config(cfg.model)
        assert {"vis_processor", "text_processor"} == set(cfg.preprocess)
    elif path.startswith("configs/datasets"):
        (section,) = cfg.datasets.values()
        assert {"data_type", "build_info", "vis_processor", "text_processor"} <= set(section)
    else:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
        monkeypatch.setattr("lavis_kvmod.config.loading.data_problems", lambda cfg: [])
        monkeypatch.setattr("lavis_kvmod.weights.downloads.reachable", lambda url: True)
        yours = ["model.finetuned=https://example.org/yours.pth"] if cfg.model.get("load_finetuned") else []
        merged = load_config(path, yours)
        assert merged.run_cfg.runner == "runner_kvmod"


def test_a_data_set_of_another_kind_than_the_task_learns():
    (told,) = problems(["run.task=kvmod_captioning"])
    assert told == (
        "datasets.digits_vqa: it holds answers, but run.task: kvmod_captioning learns captions; set run.task: kvmod_vqa"
    )
    load_config(DEMO, ["run.task=kvmod_captioning"], data_only=True)  # to be packed, data need no task


def test_sharding_wants_torchrun(monkeypatch):
    told = problems(["run.fsdp=true", "run.max_grad_norm=0"])
    assert "run.fsdp: needs several processes; start the run with torchrun --nproc_per_node=N" in told
    assert len(told) == 2
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    load_config(DEMO, ["run.fsdp=true"])


def test_a_section_that_nobody_reads():
    (told,) = problems(["vis_processor.train.name=blip_image_eval"])
    assert told == "vis_processor: not a section that LAVIS reads; those are model, datasets, run, env, preprocess"


def test_unknown_names_name_the_known_ones():
    found = problems(
        [
            "run.task=vqqa",
            "run.runner=runner_kv",
            "run.lr_sched=cosine",
            "datasets.digit_vqa.type=default",
            "model.model_type=demoo",
        ]
    )
    text = "\n".join(found)
    assert "run.task: 'vqqa' is not known (did you mean vqa?)" in text and "kvmod_vqa" in text
    assert "run.runner: 'runner_kv' is not known (did you mean runner_kvmod?)" in text
    assert "run.lr_sched: 'cosine' is not known" in text and "linear_warmup_cosine_lr" in text
    assert "datasets: 'digit_vqa' is not known (did you mean digits_vqa?)" in text
    assert "model.model_type: 'demoo' is not known (did you mean demo?)" in text


def test_model_faults_are_told_together():
    found = problems(
        [
            "model.prefix_gate=sigmoid",
            "model.prefix_sharing=all",
            "model.aux_encoder=efficientnet-b9",
            "model.num_prefix_tokens=0",
            "model.kv_modulaton=true",
            "run.device=cuda",
            "run.amp=fp8",
            "run.batch_size_train=0",
        ]
    )
    text = "\n".join(found)
    for part in (
        "model.prefix_gate: expected one of none, tanh; got 'sigmoid'",
        "model.prefix_sharing: expected one of shared, per_layer; got 'all'",
        "model.aux_encoder: expected one of efficientnet-b0",
        "model.num_prefix_tokens: expected a whole number above 0, got 0",
        "model.kv_modulaton: unknown key; did you mean kv_modulation?",
        "run.device: cuda, but",
        "run.amp: expected true, false, fp16 or bf16; got 'fp8'",
        "run.batch_size_train: expected a whole number above 0, got 0",
    ):
        assert part in text, part


def test_missing_and_unreadable_checkpoints_are_found_before_anything_is_built(monkeypatch, tmp_path):
    monkeypatch.setattr("lavis_kvmod.demo.parts.vision_weights", lambda: pytest.fail("built a demo part"))
    (tmp_path / "broken.pth").write_bytes(b"no checkpoint")
    found = problems(
        [
            f"model.pretrained={tmp_path / 'broken.pth'}",
            "model.aux_checkpoint=/nowhere/b3.pth",
            "run.resume_ckpt_path=/nowhere/last.pth",
        ]
    )
    text = "\n".join(found)
    assert "broken.pth" in text and "not a readable checkpoint" in text
    assert "no such file /nowhere/b3.pth; set model.aux_checkpoint to a local file" in text
    assert "no such file /nowhere/last.pth; set run.resume_ckpt_path to a local file" in text


def test_missing_data_says_where_it_was_looked_for(tmp_path, monkeypatch):
    """For all splits together, and nothing of LAVIS's own sets needs a run file of ours."""
    monkeypatch.setattr("lavis_kvmod.weights.downloads.reachable", lambda url: False)
    options = [f"datasets.vqav2.build_info.images.storage={tmp_path / 'no-images'}"]
    text = "\n".join(problems(options, "projects/kvmod/vqa.yaml"))
    assert f"datasets.vqav2: train: no folder {tmp_path / 'no-images' / 'train2014'} (images); get http" in text
    assert "v2_mscoco_train2014_annotations.json" in text and "v2_mscoco_val2014_annotations.json" in text
    assert "test2015" not in text  # the run does not use it
    text = "\n".join(problems([], "lavis/projects/blip/train/okvqa_ft.yaml"))
    assert "datasets.ok_vqa: no folder /export/home/.cache/lavis/coco/images" in text.replace("/../", "/")
    assert "okvqa/okvqa_train.json cannot be had; get it elsewhere and put it there, or set build_info" in text


def test_the_run_file_says_where_data_lies(tmp_path, monkeypatch):
    """``env.cache_root``, relative to where one stands; the next run file is not bound by it."""
    before = registry.get_path("cache_root")
    (tmp_path / "run.yaml").write_text((resource(DEMO)).read_text() + "\nenv: {cache_root: here}\n")
    monkeypatch.chdir(tmp_path)
    load_config("run.yaml")
    assert registry.get_path("cache_root") == str(tmp_path / "here")
    load_config("run.yaml", ["env.cache_root=~/there"])
    assert registry.get_path("cache_root") == str(Path.home() / "there")
    load_config(DEMO)
    assert registry.get_path("cache_root") == before
    assert problems(["env.cache_root=[a,b]"]) == ["env.cache_root: expected the path of a folder, got ['a', 'b']"]
    assert registry.get_path("cache_root") == before


def test_image_sizes_agree_where_they_are_used():
    wrong = ["datasets.digits_vqa.vis_processor.train.image_size=64"]
    assert problems(wrong) == [
        "datasets.digits_vqa.vis_processor.train.image_size: expected model.image_size 56, got 64"
    ]
    load_config(DEMO, [*wrong, "run.evaluate=true"])  # nothing is trained, so nothing is wrong


def test_sections_and_files_that_are_not_there(tmp_path):
    (tmp_path / "empty.yaml").write_text("run:\n  task: kvmod_vqa\n")
    assert {"model: this section is missing", "datasets: this section is missing"} <= set(
        problems(path=str(tmp_path / "empty.yaml"))
    )
    (tmp_path / "broken.yaml").write_text("run: [unclosed\n")
    assert "not valid YAML" in problems(path=str(tmp_path / "broken.yaml"))[0]
    with pytest.raises(FileNotFoundError, match="projects/kvmod/demo_vqa.yaml"):
        load_config("projects/kvmod/demo_vaq.yaml")


def test_defaults_and_options(tmp_path):
    cfg = load_config(DEMO, ["model.num_prefix_tokens=4", "run.max_epoch=3"])
    assert (cfg.model_cfg.num_prefix_tokens, cfg.run_cfg.max_epoch) == (4, 3)
    assert cfg.model_cfg.vit_model == "demo"  # from the model type
    stock = "model: {arch: blip2_opt, model_type: pretrain_opt2.7b}\ndatasets: {digits_vqa: {}}\nrun: {device: cpu}\n"
    (tmp_path / "stock.yaml").write_text(stock)
    assert load_config(str(tmp_path / "stock.yaml")).run_cfg.runner == "runner_base"
    ours = "model: {arch: blip2_opt_kvmod, model_type: demo}\ndatasets: {digits_vqa: {}}\nrun: {device: cpu}\n"
    (tmp_path / "ours.yaml").write_text(ours)
    assert load_config(str(tmp_path / "ours.yaml")).run_cfg.runner == "runner_kvmod"


def test_settings_defaults_are_valid_but_for_the_checkpoint():
    with pytest.raises(SettingsError, match="finetuned: load_finetuned is true"):
        ModelSettings.from_config({})
    assert ModelSettings.from_config({"load_finetuned": False}).num_prefix_tokens == 8


def test_the_command_ends_with_all_that_is_missing_and_names_the_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--cfg-path", "projects/kvmod/vqa.yaml"]) == 2
    told = capsys.readouterr().err
    for part in ("has no CUDA", "coco/images", "v2_Questions_Train_mscoco.zip", "demo_vqa.yaml"):
        assert part in told
    assert list(tmp_path.iterdir()) == []


def test_the_runner_is_a_lavis_runner():
    from lavis.runners.runner_base import RunnerBase

    assert issubclass(RunnerKVMod, RunnerBase)


@pytest.mark.parametrize("value", ["1", "null", "''"])
def test_the_output_folder_is_a_path(value):
    with pytest.raises(ConfigurationError, match="run.output_dir: expected the path of a folder"):
        load_config("projects/kvmod/demo_vqa.yaml", [f"run.output_dir={value}"])


def test_texts_longer_than_the_language_model_are_told(tmp_path):
    """The demo's has 128 positions."""
    with pytest.raises(ConfigurationError) as told:
        load_config("projects/kvmod/demo_vqa.yaml", [f"run.output_dir={tmp_path}", "run.max_len=120"])
    (problem,) = told.value.problems
    assert problem.startswith("run.max_len: model.num_query_token 8 + model.max_txt_len ")
    assert problem.endswith(" positions, and demo has 128; set it lower")
