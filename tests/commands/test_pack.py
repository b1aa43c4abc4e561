"""``lavis-kvmod pack``: from a run file to shards, and from its own words to a run file over them."""

import fcntl
import json
import multiprocessing
import os
import pty
import random
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from PIL import Image

from lavis_kvmod.commands import cli
from lavis_kvmod.commands.pack import pack
from lavis_kvmod.config.loading import load_config
from lavis_kvmod.datasets.shards.builders import WdsVQABuilder
from lavis_kvmod.datasets.shards.files import read_index
from lavis_kvmod.system.schema import ConfigurationError


@pytest.fixture()
def run_file(tmp_path):
    """A run file over LAVIS's ok_vqa files, for a machine other than this one: nine questions of three photographs."""
    (tmp_path / "images").mkdir()
    for n in range(3):
        Image.new("RGB", (32, 24), (n, 9, 9)).save(tmp_path / "images" / f"{n}.jpg")
    rows = [
        {"image": f"{n}.jpg", "image_id": n, "question": f"what, {q}?", "question_id": 10 * n + q, "answer": ["a"] * 10}
        for q in range(3)
        for n in range(3)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "answers.json").write_text('["a", "b"]')
    files = {"train": ["rows.json"], "test": ["rows.json", "answers.json"]}
    annotations = {
        split: {"url": [str(tmp_path / n) for n in names], "storage": [str(tmp_path / n) for n in names]}
        for split, names in files.items()
    }
    config = {
        "model": {"arch": "blip2_opt_kvmod", "model_type": "pretrain_opt2.7b", "vit_checkpoint": "/nowhere/vit.pth"},
        "datasets": {
            "ok_vqa": {"build_info": {"images": {"storage": str(tmp_path / "images")}, "annotations": annotations}}
        },
        "run": {"task": "kvmod_vqa", "device": "cuda", "train_splits": ["train"], "test_splits": ["test"]},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def test_a_run_file_is_packed_where_it_could_not_run(run_file, tmp_path, capsys):
    """Neither its GPU nor its weights are here; its data is."""
    with pytest.raises(ConfigurationError):
        load_config(run_file)
    assert cli.main(["pack", "--cfg-path", run_file, "--out", str(tmp_path / "out"), "--split", "train"]) == 0
    said = capsys.readouterr().out
    assert "train: 1 shards, 3 images with 9 texts" in said
    assert not (tmp_path / "out" / "test").exists()

    snippet = yaml.safe_load(said[said.index("datasets:") :])["datasets"]["wds_vqa"]
    section = OmegaConf.load(WdsVQABuilder.default_config_path()).datasets.wds_vqa
    dataset = WdsVQABuilder(OmegaConf.merge(section, snippet)).build_datasets()["train"]
    (batch,) = dataset.make_loader(batch_size=9)
    assert sorted(batch["text_input"]) == sorted(f"what, {q}?" for q in range(3) for _ in range(3))
    assert batch["weight"].tolist() == [1.0] * 9


def test_by_default_the_splits_that_the_run_uses(run_file, tmp_path):
    written = pack(run_file, str(tmp_path / "out"), options=["run.valid_splits=[test]"], max_count=2, prefix="mine")
    assert {split: len(shards) for split, shards in written.items()} == {"train": 2, "test": 2}
    index = read_index(tmp_path / "out" / "test")
    assert index["shards"]["test-000000.tar"].first_key == "mine-test-00000000"
    assert index["made_from"]["settings"]["seed"] is None  # what is evaluated keeps its order
    assert json.loads((tmp_path / "out" / "test" / "answers.json").read_text()) == ["a", "b"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--cfg-path", "RUN"], "error: --out: not given"),
        (
            ["--cfg-path", "RUN", "--out", "OUT", "--split", "dev"],
            "no data set has a split 'dev'; ok_vqa has train, test",
        ),
        (["--cfg-path", "RUN", "--out", "OUT", "--dataset", "gqa"], "--dataset: .*run.yaml has ok_vqa, got 'gqa'"),
        (["--cfg-path", "RUN", "--out", "OUT", "--max-count", "0"], "max_count: expected a number above 0, got 0"),
        (["--cfg-path", "nowhere.yaml", "--out", "OUT"], "expected a YAML file, got 'nowhere.yaml'"),
        (["--index", "OUT/*.tar"], "no shards found under 1 of the names given"),
    ],
)
def test_what_is_wrong_is_said_without_a_traceback(run_file, tmp_path, capsys, arguments, message):
    there = [a.replace("RUN", run_file).replace("OUT", str(tmp_path / "out")) for a in arguments]
    assert cli.main(["pack", *there]) == 2
    said = capsys.readouterr().err
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(said)
    assert not (tmp_path / "out").exists()


def test_missing_data_is_told_as_a_run_would(run_file, tmp_path):
    with pytest.raises(ConfigurationError, match=r"datasets.ok_vqa: .*no folder .*elsewhere"):
        pack(
            run_file,
            str(tmp_path / "out"),
            options=[f"datasets.ok_vqa.build_info.images.storage={tmp_path}/elsewhere"],
        )


def test_an_index_is_written_by_the_command(run_file, tmp_path, capsys):
    pack(run_file, str(tmp_path / "out"), splits=["train"], max_count=2)
    (tmp_path / "out" / "train" / "shards.json").unlink()
    assert cli.main(["pack", "--index", str(tmp_path / "out" / "train")]) == 0
    assert f"wrote {tmp_path}/out/train/shards.json" in capsys.readouterr().out
    assert sum(c.texts for c in read_index(tmp_path / "out" / "train")["shards"].values()) == 9


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(run_file, tmp_path):
    """SIGKILL and SIGTERM, in a process of its own, until a call comes through."""
    rows = []
    for n in range(120):
        Image.effect_noise((96, 96), 80).save(tmp_path / "images" / f"n{n}.png")
        rows.append({"image": f"n{n}.png", "question": "q?", "question_id": n, "answer": ["a"]})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    pack(run_file, str(tmp_path / "whole"), splits=["train"], max_count=15)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole" / "train").iterdir() if path.name != ".lock"}

    out, killed, status = tmp_path / "out", 0, None
    command = ["pack", "--cfg-path", run_file, "--split", "train", "--max-count", "15", "--out", str(out)]
    fork = multiprocessing.get_context("fork")  # importing LAVIS anew would take most of the time
    for attempt in range(12):
        process = fork.Process(target=lambda: os._exit(cli.main(command)))
        process.start()
        chance = random.Random(attempt)
        if attempt < 11:
            # Until one shard more is there, and then somewhere in the next.
            while process.is_alive() and len(list(out.glob("train/*.tar"))) <= attempt:
                time.sleep(0.001)
            time.sleep(chance.random() * 0.02)
            chance.choice([process.kill, process.terminate])()
        process.join(60)
        status = process.exitcode
        killed += status != 0
        for shard in out.glob("train/*.tar"):
            assert shard.read_bytes() == whole[shard.name]
        if status == 0:
            break
    assert killed >= 5 and status == 0
    assert {path.name: path.read_bytes() for path in (out / "train").iterdir() if path.name != ".lock"} == whole


@pytest.mark.slow
@pytest.mark.parametrize("watched", [True, False])
def test_the_command_shows_how_far_it_is(run_file, tmp_path, watched):
    """A bar where stderr is a terminal, a log line where it is none."""
    command = [sys.executable, "-m", "lavis_kvmod", "pack", "--cfg-path", run_file, "--out", str(tmp_path / "out")]
    reader, stderr = pty.openpty() if watched else os.pipe()
    if watched:
        fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # a new terminal has no columns
    process = subprocess.Popen(
        [*command, "--split", "train"],
        stdout=subprocess.PIPE,
        stderr=stderr,
        env={**os.environ, "TQDM_MININTERVAL": "0"},  # three images are packed sooner than a bar moves
    )
    os.close(stderr)
    said, piece = b"", b" "
    while piece:
        try:
            piece = os.read(reader, 4096)
        except OSError:  # how a terminal ends, on Linux
            piece = b""
        said += piece
    os.close(reader)
    assert b"train: 1 shards, 3 images with 9 texts" in process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    bar, line = re.search(rb"packing train: .*3/3 \[", said), re.search(rb"\[INFO\] packing train \[3/3\]", said)
    assert (bar and not line) if watched else (line and not bar), repr(said)


def test_the_pages_run_file_section_builds(run_file, tmp_path):
    """docs/shards.md: what it says to write, over shards packed here."""
    page = (Path(__file__).parents[2] / "docs" / "shards.md").read_text(encoding="utf-8")
    pack(run_file, str(tmp_path / "out"), splits=["train"])
    pack(run_file, str(tmp_path / "out"), splits=["test"])
    (tmp_path / "out" / "test").rename(tmp_path / "out" / "val")
    (block,) = [text.split("```")[0] for text in page.split("```yaml\n")[1:]]
    written = yaml.safe_load(block.replace("/data/shards", str(tmp_path / "out")))["datasets"]["wds_vqa"]
    section = OmegaConf.load(WdsVQABuilder.default_config_path()).datasets.wds_vqa
    datasets = WdsVQABuilder(OmegaConf.merge(section, written)).build_datasets()
    assert {split: len(dataset) for split, dataset in datasets.items()} == {"train": 9, "val": 9}
    table = page[page.index("## All keys") : page.index("## What is in a shard")]
    for key in set(section) - {"data_type", "build_info"}:
        assert f"`{key}`" in table, key
