"""What is wrong with a run section is told at once, before anything is loaded."""

import logging
import os

import pytest
import torch

from lavis_kvmod.config import checking
from lavis_kvmod.config.keys import unread_keys
from lavis_kvmod.config.loading import load_config
from lavis_kvmod.system.schema import ConfigurationError

DEMO = "projects/kvmod/demo_vqa.yaml"

WRONG = {  # value, and what is expected
    "warmup_steps": ("abc", "a whole number from 0, got 'abc'"),
    "init_lr": ("abc", "a number above 0, got 'abc'"),
    "min_lr": ("abc", "a number from 0, got 'abc'"),
    "weight_decay": ("x", "a number from 0, got 'x'"),
    "num_workers": ("-1", "a whole number from 0, got -1"),
    "seed": ("x", "a whole number from 0, got 'x'"),
    "log_freq": ("0", "a whole number above 0, got 0"),
    "num_beams": ("0", "a whole number above 0, got 0"),
    "beta2": ("2", "a number from 0, below 1; got 2"),
    "max_len": ("0", "a whole number above 0, got 0"),
    "top_p": ("1.5", "a number above 0, at most 1; got 1.5"),
    "use_nucleus_sampling": ("2", "true or false, got 2"),
    "valid_splits": ("val", "a list of names, got 'val'"),
}


def problems(*options, path=DEMO, **kwargs):
    with pytest.raises(ConfigurationError) as caught:
        load_config(path, list(options), **kwargs)
    return caught.value.problems


def test_every_wrong_value_is_told_with_what_is_expected():
    told = problems(*(f"run.{key}={value}" for key, (value, _) in WRONG.items()), "run.lr_sched=linear_warmup_step_lr")
    for key, (_, expected) in WRONG.items():
        assert f"run.{key}: expected {expected}" in told
    assert "run.lr_decay_rate: linear_warmup_step_lr needs it, a number above 0, at most 1; got none" in told
    assert len(told) == len(WRONG) + 1


def test_values_are_used_as_they_are_meant():
    """A number in quotes is one (LAVIS compares warmup_lr as it stands); null is the default."""
    run = load_config(DEMO, ["run.warmup_lr='1e-6'", "run.keep_last=null", "run.test_splits=null"]).run_cfg
    assert (run.warmup_lr, run.test_splits) == (1e-6, [])
    assert run.keep_last == 2


def test_what_a_value_refers_to_must_be_there(monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    told = problems(
        "model.pretrained=${oc.env:NOT_SET}",
        "model.qformer_geometry.hidden_size=${run.nothing}",
        "run.seed=${oc.env:NOT_SET}",
    )
    assert set(told) == {
        "model.pretrained: Environment variable 'NOT_SET' not found",
        "model.qformer_geometry.hidden_size: Interpolation key 'run.nothing' not found",
        "run.seed: Environment variable 'NOT_SET' not found",
    }
    monkeypatch.setenv("FOLDER", "elsewhere")
    cfg = load_config(DEMO, ["run.output_dir=${oc.env:FOLDER}", "run.seed=7", "model.num_prefix_tokens=${run.seed}"])
    assert (cfg.run_cfg.output_dir, cfg.model_cfg.num_prefix_tokens) == ("elsewhere", 7)


def test_a_gpu_of_ones_own_choice_cannot_work(monkeypatch):
    monkeypatch.setattr(checking, "cuda_capability", lambda: (8, 0))
    (told,) = problems("run.device=cuda:1")
    assert told.startswith("run.device: cuda:1 cannot work") and "CUDA_VISIBLE_DEVICES=1" in told
    load_config(DEMO, ["run.device=cuda:0"])
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    (told,) = problems("run.device=cuda:0")
    assert told == "run.device: cuda:0 puts all processes on one GPU; set run.device: cuda, and each has its own"
    load_config(DEMO, ["run.device=cuda"])


def test_an_output_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (told,) = problems(f"run.output_dir={tmp_path / 'file' / 'out'}")
    assert told == f"run.output_dir: {tmp_path / 'file'} is a file; name a folder"
    access = os.access  # root may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path) and access(path, mode))
    (told,) = problems(f"run.output_dir={tmp_path / 'out'}")
    assert told == f"run.output_dir: {tmp_path} cannot be written to; name a folder of yours"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("splits", ["[train,val]", "[val]", "[]"])
def test_what_is_trained_on_is_the_train_split(splits):
    (told,) = problems(f"run.train_splits={splits}")
    assert told.startswith("run.train_splits: ")
    assert (
        "there is nothing to train" if splits == "[]" else "annotations.train.storage: [train.csv, val.csv]"
    ) in told
    load_config(DEMO, [f"run.train_splits={splits}", "run.evaluate=true"])


def test_a_prompt_is_checked_and_an_evaluation_takes_a_checkpoint():
    told = problems("run.prompt='Q: {} {}'", "run.evaluate=true", "run.resume_ckpt_path=auto")
    assert any(line.startswith("run.prompt: expected at most one {}") for line in told)
    assert any(line.startswith("run.resume_ckpt_path: auto goes on with a training") for line in told)


def test_texts_that_the_language_model_has_no_positions_for():
    (told,) = problems("run.max_len=600")
    assert told.startswith("run.max_len: model.num_query_token ") and "set it lower" in told


def test_keys_that_nothing_reads_are_told_with_the_reason(caplog):
    run = {"task": "kvmod_captioning", "runner": "runner_kvmod"}
    told = unread_keys({**run, "num_beam": 3, "answer_list": "a.txt", "k_test": 128, "use_dist_eval_sampler": False})
    assert told == [
        "run.num_beam: not a key that LAVIS or lavis-kvmod reads; did you mean num_beams?",
        "run.answer_list: changes nothing here, task kvmod_vqa alone reads it",
        "run.k_test: changes nothing here, task kvmod_retrieval alone reads it",
        "run.use_dist_eval_sampler: changes nothing here, every sample is evaluated once, on one rank, whatever it "
        "says",
    ]
    assert unread_keys({"task": "vqa", "runner": "runner_base", "answer_list": "a", "k_test": 1, "keep_last": 2}) == [
        "run.keep_last: changes nothing here, runner_kvmod alone reads it"
    ]
    with caplog.at_level(logging.WARNING):
        load_config(DEMO, ["run.k_test=3"])
    assert "run.k_test: changes nothing here" in caplog.text


def test_without_a_home_folder_the_variables_are_named(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as it is for a user id without a name
    monkeypatch.delenv("LAVIS_KVMOD_CACHE", raising=False)
    (told,) = problems()
    assert told.startswith("no home folder is known") and told.endswith("or LAVIS_KVMOD_CACHE")
    assert "set HOME" in told
    (told,) = problems("run.output_dir=~/out", "model.kv_modulation=false", "model.pretrained=null")[:1]
    assert told.startswith("run.output_dir: ~/out: no home folder is known")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_cuda_is_told_beside_the_rest():
    assert len(problems("run.device=cuda:1", "run.seed=x")) == 3


def test_what_stage_1_cannot_start_from_is_told(tmp_path):
    torch.save({"model": {"opt_proj.weight": torch.zeros(2, 2)}}, tmp_path / "stage2.pth")
    options = ["model.load_pretrained=true", f"model.pretrained={tmp_path / 'stage2.pth'}"]
    (told,) = problems(*options, path="projects/kvmod/demo_stage1.yaml")
    assert (
        told.startswith(f"model.pretrained: {tmp_path / 'stage2.pth'} is of stage 2") and "stage-1 checkpoint" in told
    )


def test_a_head_that_is_not_trained_ranks_nothing():
    (told,) = problems("run.k_test=16", path="projects/kvmod/demo_stage1.yaml")
    assert told.startswith("run.k_test: 16 are ranked anew by the matching head, which model.objectives.itm: 0")
    load_config("projects/kvmod/demo_stage1.yaml", ["run.k_test=16", "model.objectives.itm=1"])


def test_stage_1_needs_what_its_objectives_need():
    told = problems(
        "model.objectives={itc: 0, itm: 1}",
        "model.momentum={queue: 0}",
        "model.max_txt_len=600",
        path="projects/kvmod/demo_stage1.yaml",
    )
    assert [problem.split(":")[0] for problem in told] == [
        *["model.objectives.itm", "model.momentum.queue"],
        "model.max_txt_len",
        "model.momentum",
    ]
    assert "at most BERT's 512 positions, got 600" in told[2]
    assert "it softens the targets of itc and mlm, and both are 0" in told[-1]
