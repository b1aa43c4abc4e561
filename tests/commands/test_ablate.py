"""`lavis-kvmod ablate`: a small study in this process, stopped and gone on with, and what is told of a bad one."""

import json
import multiprocessing
import re
import signal
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from jobs import train_until_stopped
from omegaconf import OmegaConf

from lavis_kvmod.commands import ablate
from lavis_kvmod.commands.launch import load_config
from lavis_kvmod.models.vision.feature_cache import FrozenFeatureCache
from lavis_kvmod.studies import running
from lavis_kvmod.studies.study import load_study
from lavis_kvmod.system.paths import resource

DATA = {"digits_a_page": 2, "page_size": 56, "digit_size": 28, "train_scans": 24, "pages_a_scan": 1}
STUDY = {
    "about": "Does it run?",
    "seeds": [1, 2],
    "arms": {
        "A0": {"about": "no prefix", "options": {"model.kv_modulation": False}},
        "A1": {"about": "a constant", "options": {"model.prefix_control": "constant"}},
        "A5": {"about": "the prefix"},
    },
    "primary": {"metric": "answer_type/needs both", "arm": "A5", "against": "A0"},
    "dose": {"A0": 0, "A5": 1},
    "gains": {"A5": "A0"},
    "shows_not": ["Anything: it is too small."],
    "resamples": 200,
}


@pytest.fixture(autouse=True)
def _same_sigterm():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture()
def study_of(tmp_path, model_config, monkeypatch):
    """A function: run file and study file as the command takes them, with overrides of the study."""
    monkeypatch.chdir(tmp_path)
    size = {"name": "blip_image_eval", "image_size": 28}
    run = {
        "task": "kvmod_vqa", "device": "cpu", "max_epoch": 1, "num_workers": 0, "num_beams": 1, "max_len": 3,
        "batch_size_train": 32, "batch_size_eval": 64, "test_splits": ["test"], "output_dir": "output",
        "warmup_steps": 1, "init_lr": 1e-3,
    }  # fmt: skip
    model = {**model_config(cache_frozen_features=True), "model_type": "pretrain_opt2.7b"}
    data = {**DATA, "vis_processor": {"train": size, "eval": size}}
    OmegaConf.save({"model": model, "datasets": {"digits_pages": data}, "run": run}, tmp_path / "run.yaml")

    def write(**overrides):
        (tmp_path / "study.yaml").write_text(json.dumps({**STUDY, **overrides}))
        return Namespace(
            cfg_path="run.yaml",
            study="study.yaml",
            output_dir="out",
            jobs=1,
            keep_checkpoints=False,
            options=[],
            write=None,
        )

    return write


@pytest.mark.slow
def test_a_study_is_trained_gone_on_with_and_told(study_of, tmp_path, monkeypatch, capsys):
    from lavis_kvmod.demo import digits

    few = {split: digits.load_scans(split)[:count] for split, count in (("train", 24), ("val", 4), ("test", 16))}
    monkeypatch.setattr(digits, "load_scans", few.__getitem__)
    encoded = []
    call = FrozenFeatureCache.__call__

    def counting(self, keys, image, encode):
        return call(self, keys, image, lambda some: encoded.append(len(some)) or encode(some))

    monkeypatch.setattr(FrozenFeatureCache, "__call__", counting)
    train, trained = running.train_member, []

    def stopping(member, *rest):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(member)
        return train(member, *rest)

    monkeypatch.setattr(running, "train_member", stopping)
    with pytest.raises(KeyboardInterrupt):
        ablate.main(study_of())
    of_features = len(encoded)
    monkeypatch.setattr(running, "train_member", lambda *all_of: trained.append(all_of[0]) or train(*all_of))
    assert ablate.main(study_of()) == 0
    assert [(member.arm, member.seed) for member in trained] == [
        (arm, seed) for seed in (1, 2) for arm in ("A0", "A1", "A5")
    ]
    assert len({member.features for member in trained}) == 2  # A1 differs only after the features
    assert len(encoded) == of_features > 0  # nothing was encoded but in the first stage
    assert not list((tmp_path / "out").rglob("*.pth")) and not list((tmp_path / "out" / "features").glob("*.pt"))

    told = json.loads((tmp_path / "out" / "results.json").read_text())
    assert told["seeds"] == [1, 2] and told["images"] == 8
    arms = told["arms"]
    assert arms["A1"]["trained_parameters"] == arms["A5"]["trained_parameters"] > arms["A0"]["trained_parameters"]
    costs = arms["A5"]["costs"]
    assert costs["soft_prompt"] == 5 and arms["A0"]["costs"]["peak_memory_gib"] < costs["peak_memory_gib"] < 0.5
    assert 0 < costs["answer_seconds"] < costs["step_seconds"] < 5
    assert arms["A0"]["use"]["overall"] is None and arms["A5"]["use"]["overall"]["log_prob"]["mean"] != 0
    assert arms["A1"]["use"]["overall"] == {
        "utilisation": arms["A1"]["use"]["overall"]["utilisation"],
        "log_prob": {"mean": 0, "low": 0, "high": 0, "sd": 0},
    }
    page, text = ((tmp_path / "out" / name).read_text() for name in ("report.html", "report.md"))
    for part in (
        "needs neither",
        "tokens into the language model",
        "What this does not show",
        "Anything: it is too small.",
        "commonest answer",
    ):
        assert part in page and part in text
    assert "<svg" in page and "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "| A5 | the prefix |" in text and "Slope" in text
    knows = told["probes"]["A5"]
    assert set(knows) == {"on the left", "paper", "one line"} and set(told["probes"]["A0"]["paper"]) == {"vit"}
    assert told["gains"] is None  # no probe can be asked what its primary metric asks
    assert "| A1, A5 | second encoder |" in text
    trained.clear()
    (tmp_path / "page.md").write_text("Before\n<!-- study: study -->\nstale\n<!-- end -->\nAfter\n")
    args = study_of()
    args.write = tmp_path / "page.md"
    assert ablate.main(args) == 0 and not trained
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("Before\n") and page.endswith("After\n") and "stale" not in page and "\n## study\n" in page
    assert "Report: " in capsys.readouterr().out


@pytest.mark.slow
def test_two_trainings_at_once_give_what_one_after_the_other_does(study_of, tmp_path):
    found = {}
    for jobs in (1, 2):
        args = study_of(seeds=[1], dose={}, arms={name: STUDY["arms"][name] for name in ("A0", "A5")})
        args.jobs, args.output_dir = jobs, f"jobs{jobs}"
        assert ablate.main(args) == 0
        found[jobs] = json.loads((tmp_path / f"jobs{jobs}" / "results.json").read_text())
        for arm in found[jobs]["arms"].values():
            arm.pop("seconds")
            arm["costs"] = {name: arm["costs"][name] for name in ("soft_prompt", "peak_memory_gib")}
    assert found[1] == found[2]
    (told,) = (tmp_path / "jobs2" / "runs").glob("A5-seed1-*/output.txt")
    assert "Training time" in told.read_text()


def has_ended(worker):
    """The pool's own thread waits for it, too: who comes second is told for a moment that it is alive."""
    for _ in range(200):
        worker.join(0.1)
        if not worker.is_alive():
            return True
        time.sleep(0.05)
    return False


def test_who_stops_a_study_stops_its_workers():
    with pytest.raises(KeyboardInterrupt), running._workers(2) as pool:
        pool.submit(time.sleep, 200)
        workers = multiprocessing.active_children()
        raise KeyboardInterrupt
    assert workers
    for worker in workers:
        assert has_ended(worker)


@pytest.mark.slow
def test_who_stops_a_study_stops_its_workers_and_what_waits_behind(tmp_path):
    with pytest.raises(KeyboardInterrupt), running._workers(2) as pool:
        for number in range(6):
            pool.submit(train_until_stopped, str(tmp_path), number)
        workers = multiprocessing.active_children()
        for _ in range(1200):
            if (tmp_path / "0").exists() and (tmp_path / "1").exists():
                break
            time.sleep(0.1)
        raise KeyboardInterrupt
    assert len(workers) == 2
    for worker in workers:
        assert has_ended(worker)
    assert not (tmp_path / "2").exists()


def test_a_training_that_fails_is_named(study_of, monkeypatch, capsys):
    def fails(*given):
        raise FloatingPointError("loss nan")

    monkeypatch.setattr(running, "_compute", lambda *given: "")
    monkeypatch.setattr(running, "train_member", fails)
    assert ablate.main(study_of()) == 1
    assert "error: A0, seed 1: loss nan. Start again to go on" in capsys.readouterr().err


def test_a_bad_study_is_told_whole_before_anything_is_trained(study_of, monkeypatch, capsys):
    monkeypatch.setattr(ablate, "run_members", lambda *given: pytest.fail("trained"))
    bad = study_of(
        seeds=[1, 1],
        sedes=[1],
        arms={"A0": {"option": {}}, "B/1": {"options": {"prefix_gate": "tanh"}}},
        primary={"metric": "accuracy", "arm": "A1", "against": "A0"},
    )
    assert ablate.main(bad) == 2
    told = capsys.readouterr().err
    for part in (
        "sedes: unknown key; did you mean seeds?",
        "seeds: expected whole numbers, each once, got [1, 1]",
        "arms.A0.option: unknown key; did you mean options?",
        "arms.B/1: a name is letters",
        "arms.B/1.options: expected section.key, got 'prefix_gate'",
        "primary.metric: expected overall, question_type/NAME or answer_type/NAME, got 'accuracy'",
        "primary.arm: A1: no arm of this study",
        "gains: A5: no arm of this study",
    ):
        assert part in told, part
    arms = {**STUDY["arms"], "A6": {"options": {"model.prefix_gate": "sigmoid", "run.max_epoch": 0}}}
    assert ablate.main(study_of(arms=arms, split="val")) == 2
    told = capsys.readouterr().err
    assert "arms.A6: model.prefix_gate: expected one of none, tanh; got 'sigmoid'" in told
    assert "arms.A6: run.max_epoch" in told
    arms["A6"]["options"] = {}
    assert ablate.main(study_of(arms=arms, split="val")) == 2
    assert "split: 'val' is not among the run.test_splits of arm A0" in capsys.readouterr().err
    assert ablate.main(Namespace(**{**vars(bad), "study": "nothing.yaml"})) == 2
    assert "expected a study's YAML file, got 'nothing.yaml'" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(path.name for path in (Path(__file__).parents[2] / "studies").glob("*.yaml")))
def test_a_shipped_study_is_whole(name, monkeypatch):
    head = resource(f"studies/{name}").read_text(encoding="utf-8").partition("\nabout:")[0]
    assert f"--study studies/{name}" in head
    for checkpoint in ("STAGE_2", "READER"):  # that chain.yaml and tiles.yaml start from
        monkeypatch.setenv(checkpoint, "")
    study, configs = load_study(f"studies/{name}", re.search(r"--cfg-path (\S+)", head)[1], load_config)
    assert len(study.arms) == len(configs) > 1 and study.settings.about and study.settings.shows_not
    assert all(arm.about for arm in study.arms) and len(study.settings.seeds) >= 3


def test_arms_that_start_from_other_checkpoints_share_no_features(study_of, tmp_path):
    """A stage-1 checkpoint holds ln_vision, which the visual tokens go through."""
    stock = tmp_path / "stage1.pth"
    torch.save({"model": {}}, stock)
    arms = {"A0": {"about": "new"}, "A5": {"about": "from there", "options": {"model.pretrained": str(stock)}}}
    args = study_of(arms=arms)
    study, configs = load_study(args.study, args.cfg_path, load_config)
    assert len({member.features for member in study.members(tmp_path, configs)}) == 2
