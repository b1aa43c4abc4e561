"""The command as it is run: in processes of their own, in environments that work and in broken ones."""

import os
import subprocess
import sys
from functools import partial

import pytest

from lavis_kvmod.commands import cli

MISSING_DATA = """
model: {arch: blip2_opt_kvmod, model_type: demo}
datasets:
  custom_vqa:
    build_info:
      annotations: {train: {storage: /nowhere/train.csv}, val: {storage: /nowhere/val.csv}}
      images: {storage: /nowhere/images}
run:
  task: kvmod_vqa
  device: cpu
  valid_splits: [val]
  learning_rate: 1e-4
"""


def doctor(folder, *arguments, **environment):
    """Exit status and output of ``python -m lavis_kvmod doctor`` run in ``folder``, without a terminal."""
    done = subprocess.run(
        [sys.executable, "-m", "lavis_kvmod", "doctor", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=200,
        env={**os.environ, "LAVIS_KVMOD_CACHE": str(folder / "cache"), **environment},
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def line_of(screen, words):
    """The one finding that holds these words: its mark."""
    (line,) = [line for line in screen.splitlines() if words in line]
    return line.split()[0]


def here(folder, *arguments, monkeypatch, capsys):
    """The same, in this process."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LAVIS_KVMOD_CACHE", str(folder / "cache"))
    capsys.readouterr()
    status = cli.main(["doctor", *arguments])
    written = capsys.readouterr()
    assert written.err == ""
    return status, written.out


# A process of its own imports LAVIS and all that memory is computed with, which takes a while.
@pytest.mark.slow
@pytest.mark.parametrize("alone", [False, True])
def test_the_demo_runs_anywhere(tmp_path, monkeypatch, capsys, alone):
    look = doctor if alone else partial(here, monkeypatch=monkeypatch, capsys=capsys)
    status, screen = look(tmp_path, "--cfg-path", "projects/kvmod/demo_vqa.yaml")
    assert status == 0, screen
    for mark, words in (
        ("ok", "LAVIS knows blip2_opt_kvmod"),
        ("ok", "data: digits_vqa"),
        ("note", "image encoder demo: built here on first use"),
        ("ok", "training with batches of 256 takes"),
        ("ok", "evaluating with batches of 288 takes"),
    ):
        assert line_of(screen, words) == mark
    assert screen.endswith("Nothing was found that keeps projects/kvmod/demo_vqa.yaml from running.\n")
    assert len(screen.splitlines()) <= 50  # one screen
    assert list(tmp_path.iterdir()) == []  # looking leaves nothing


@pytest.mark.slow
def test_missing_data_is_named_with_the_next_step(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(MISSING_DATA)
    status = cli.main(["doctor", "--cfg-path", "mine.yaml", "--options", "run.batch_size_train=2"])
    screen = capsys.readouterr().out
    assert status == 1, screen
    assert "missing  datasets.custom_vqa" in screen and "/nowhere/train.csv" in screen
    assert line_of(screen, "run.learning_rate: not a key") == "warn"
    assert line_of(screen, "training with batches of 2 takes") == "ok"
    assert "data: custom_vqa" not in screen
    assert "keep mine.yaml from running: see the lines marked missing or wrong." in screen


def test_faults_that_leave_nothing_to_look_at(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["doctor", "--cfg-path", "nowhere.yaml"]) == 1
    assert "missing  expected a YAML file, got 'nowhere.yaml'" in capsys.readouterr().out
    (tmp_path / "broken.yaml").write_text("run: [unclosed\n")
    assert cli.main(["doctor", "--cfg-path", "broken.yaml"]) == 1
    assert "wrong    not valid YAML" in capsys.readouterr().out
    demo = ["doctor", "--cfg-path", "projects/kvmod/demo_vqa.yaml", "--options"]
    assert cli.main([*demo, "model.prefix_gate=sigmoid", "run.batch_size_train=none"]) == 1
    screen = capsys.readouterr().out
    assert line_of(screen, "model.prefix_gate: expected one of none, tanh; got 'sigmoid'") == "wrong"
    assert line_of(screen, "run.batch_size_train: expected a whole number above 0, got 'none'") == "wrong"
    assert cli.main([*demo, "run.batch_size_train=none"]) == 1
    assert line_of(capsys.readouterr().out, "memory cannot be told") == "note"


def test_turned_off_it_still_looks(monkeypatch, capsys):
    monkeypatch.setenv("LAVIS_KVMOD_DISABLE", "1")
    assert cli.main(["doctor", "--cfg-path", "projects/kvmod/demo_vqa.yaml"]) == 1
    screen = capsys.readouterr().out
    assert line_of(screen, "turned off by LAVIS_KVMOD_DISABLE") == "warn"
    assert line_of(screen, "cannot be looked at without the plugin") == "wrong"
    assert cli.main(["doctor"]) == 0
    with pytest.raises(SystemExit):
        cli.main(["params"])


@pytest.mark.parametrize(
    "module, code, words, step",
    [
        pytest.param(
            "cv2",
            "raise ImportError('numpy.core.multiarray failed to import')",
            "import lavis fails: ImportError: numpy.core",
            'pip install "numpy<2"',
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "lavis",
            "import sys; print('bye', file=sys.stderr); sys.exit(3)",
            "import lavis fails: SystemExit",
            "",
            marks=pytest.mark.slow,
        ),
        ("torch", "raise OSError('libcudart.so.13: cannot open')", "libcudart.so.13", "reinstall"),
    ],
)
def test_a_broken_environment_is_a_finding(tmp_path, module, code, words, step):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / f"{module}.py").write_text(code + "\n")
    metadata = broken / "numpy-2.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 2.1.0\n")
    path = os.pathsep.join([str(broken), os.environ.get("PYTHONPATH", "")])
    status, screen = doctor(tmp_path, "--cfg-path", "projects/kvmod/demo_vqa.yaml", PYTHONPATH=path)
    assert status == 1
    assert "wrong    numpy 2.1.0: expected 1 up to below 2" in screen
    assert words in screen and step in screen
    assert "mend the above first" in screen


def test_a_failure_while_looking_is_a_finding(monkeypatch, capsys):
    def fail():
        raise PermissionError("no such luck")

    monkeypatch.setattr("lavis_kvmod.doctor.machine.places", fail)
    assert cli.main(["doctor"]) == 1
    assert "could not be looked at: PermissionError: no such luck" in capsys.readouterr().out


@pytest.mark.slow
def test_the_full_model_without_gpu_data_or_network(tmp_path):
    status, screen = doctor(
        tmp_path,
        "--cfg-path",
        "projects/kvmod/vqa.yaml",
        "--options",
        "run.batch_size_train=16",
        LAVIS_CACHE_ROOT=str(tmp_path / "lavis"),
        TORCH_HOME=str(tmp_path / "torch"),
        HF_HOME=str(tmp_path / "hf"),
        HF_HUB_OFFLINE="1",
    )
    assert status == 1
    assert line_of(screen, "run.device: cuda, but this machine") == "missing"
    for key in ("model.vit_checkpoint", "model.opt_model", "model.aux_checkpoint", "model.pretrained"):
        assert f"set {key} to a local" in " ".join(screen.split())
    assert str(tmp_path / "lavis/coco/images/train2014") in screen
    assert line_of(screen, "training with batches of 16 takes 11.4 GiB") == "note"
