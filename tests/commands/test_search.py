"""``lavis-kvmod embed``, ``search`` and ``capfilt``: own photographs, found by a text, and texts that fit."""

import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import skimage.data
import torch
from omegaconf import OmegaConf
from PIL import Image

from lavis_kvmod.commands import capfilt, cli
from lavis_kvmod.config.loading import load_config
from lavis_kvmod.datasets.retrieval import CustomRetrievalBuilder
from lavis_kvmod.datasets.shards.builders import WdsCaptionBuilder
from lavis_kvmod.models.blip2_kvmod import Blip2KVMod
from lavis_kvmod.models.settings import Stage1Settings
from lavis_kvmod.tasks import capfilt as work
from lavis_kvmod.tasks import embedding
from lavis_kvmod.tasks.embedding import Features, read_features
from lavis_kvmod.tasks.retrieval_scores import similarity
from lavis_kvmod.weights import files as checkpoints

ROWS = [
    ("astronaut.png", "a red seven on pink paper"),
    ("chelsea.png", "a blue one on sky paper"),
    ("chelsea.png", "a grey two on white paper"),
    ("coffee.png", "a blue one on sky paper"),  # as the cat's
    ("rocket.jpg", "a green nine on yellow paper"),
]


@pytest.fixture()
def run_file(model_config, tmp_path, monkeypatch):
    """A stage-1 model from random weights, and `custom_retrieval` over a table."""
    monkeypatch.chdir(tmp_path)
    with open("test.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *ROWS])
    sizes = {key: value for key, value in model_config().items() if key in Stage1Settings.model_fields}
    sizes.update(arch="blip2_kvmod", model_type="pretrain", bert_model="demo", from_bert=False)
    sizes.update(pretrained=None, finetuned=None, load_finetuned=False)
    size = {mode: {"name": "blip_image_eval", "image_size": 28} for mode in ("train", "eval")}
    build = {"images": {"storage": str(Path(skimage.data.__file__).parent)}, "annotations": {"test": "test.csv"}}
    run = {"task": "kvmod_retrieval", "device": "cpu", "num_workers": 0, "batch_size_eval": 3, "test_splits": ["test"]}
    config = {
        "model": {key: str(value) if isinstance(value, Path) else value for key, value in sizes.items()},
        "datasets": {"custom_retrieval": {"build_info": build, "vis_processor": size}},
        "run": {**run, "k_test": 2, "output_dir": str(tmp_path / "output")},
    }
    OmegaConf.save(OmegaConf.create(config), "run.yaml")
    return "run.yaml"


def test_photographs_are_embedded_and_found(run_file, capsys):
    for kind in ("parquet", "safetensors"):
        assert cli.main(["embed", "--cfg-path", run_file, "--out", f"features.{kind}"]) == 0
    assert "features.parquet: 4 images, 4 texts" in capsys.readouterr().out
    made, again = (read_features(Path(f"features.{kind}")) for kind in ("parquet", "safetensors"))
    assert made.images == ["astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg"] and made.texts == again.texts
    assert torch.equal(made.image_features, again.image_features) and made.about["split"] == "test"

    texts = ["a blue one on sky paper", "a red seven on pink paper"]
    command = ["search", "features.parquet", *texts, "--cfg-path", run_file, "--top", "3"]
    assert cli.main([*command, "--sheet", "found.png"]) == 0
    screen = capsys.readouterr().out
    wanted = torch.stack([made.text_features[made.texts.index(text)] for text in texts])
    scores = similarity(made.image_features, wanted).t()
    order = [made.images[i] for row in scores.argsort(dim=1, descending=True)[:, :3].tolist() for i in row]
    assert [line.split()[1] for line in screen.splitlines() if line.startswith("  ")] == order
    with Image.open("found.png") as sheet:
        assert sheet.width > 3 * 128 and len(sheet.convert("RGB").getcolors(1_000_000)) > 1000
    assert cli.main([*command, "--sheet", "found.html"]) == 0
    assert Path("found.html").read_text().count("data:image/png;base64") == 6


def in_two_processes(*command):
    """Run a command under torchrun; what it prints."""
    torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*torchrun, "-m", "lavis_kvmod", *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_processes_embed_as_one_does(run_file):
    features = ["embed", "--cfg-path", run_file, "--options", "run.batch_size_eval=1", "--out"]
    assert cli.main([*features, "one.safetensors"]) == 0
    assert in_two_processes(*features, "two.safetensors").count("two.safetensors: 4 images, 4 texts") == 1
    one, two = (read_features(Path(f"{name}.safetensors")) for name in ("one", "two"))
    assert (two.images, two.texts, two.about) == (one.images, one.texts, one.about)
    for of_one, of_two in zip((one.image_features, one.text_features), (two.image_features, two.text_features)):
        assert of_one.shape == of_two.shape and (of_one - of_two).abs().max() <= 1e-6


@pytest.mark.slow
def test_two_processes_filter_as_one_does(run_file):
    model = Blip2KVMod.from_config(OmegaConf.load(run_file).model)  # random weights, the same for both
    checkpoints.save({"model": checkpoints.trained_state_dict(model)}, "stage1.pth")
    weights = ["--options", "model.load_finetuned=true", f"model.finetuned={Path('stage1.pth').resolve()}"]
    filtering = ["capfilt", "--cfg-path", run_file, "--split", "test", "--itm", "0", "--block", "1", *weights, "--out"]
    assert cli.main([*filtering, "all"]) == 0
    scores = sorted(json.loads(line)["itc"] for line in Path("all/kept.jsonl").read_text().splitlines())
    assert len(scores) == 5
    filtering[-1:-1] = ["--itc", str((scores[1] + scores[2]) / 2)]  # two are dropped
    assert cli.main([*filtering, "one"]) == 0
    in_two_processes(*filtering, "two")
    for name, count in (("kept.jsonl", 3), ("dropped.jsonl", 2)):
        one, two = (Path(folder, name).read_text() for folder in ("one", "two"))
        assert one == two and len(one.splitlines()) == count


def test_what_cannot_be_searched_is_told(run_file, tmp_path, capsys):
    assert cli.main(["search", "features.parquet", "a", "--cfg-path", run_file]) == 2
    assert "no file of features features.parquet; lavis-kvmod embed writes one" in capsys.readouterr().err
    for kind in ("parquet", "safetensors"):
        (tmp_path / f"other.{kind}").write_bytes(b"something else")
        assert cli.main(["search", f"other.{kind}", "a", "--cfg-path", run_file]) == 2
        assert "expected features of lavis-kvmod embed, got another file" in capsys.readouterr().err
    assert cli.main(["embed", "--cfg-path", run_file, "--out", "features.txt"]) == 2
    assert "expected a name that ends in .parquet or .safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command, told",
    [
        (["embed", "--out", "features.txt"], "expected a name that ends in .parquet or .safetensors"),
        (["embed", "--out", "~/features.parquet"], "no home folder is known"),
        (["search", "features.parquet", "a", "--sheet", "found.pdf"], "expected a name that ends in .png or .html"),
        (["search", "~/features.parquet", "a"], "no home folder is known"),
    ],
)
def test_where_results_cannot_go_is_told_before_a_model_is_loaded(run_file, command, told, monkeypatch, capsys):
    def loads(*args):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("lavis_kvmod.commands.embed.load", loads)
    monkeypatch.setattr("lavis_kvmod.commands.search.load", loads)
    monkeypatch.setattr("lavis_kvmod.system.paths.has_home", lambda: False)
    assert cli.main([*command, "--cfg-path", run_file]) == 2
    assert told in capsys.readouterr().err


class ExactIndex:
    """What FAISS's IndexFlatIP does, where FAISS is not installed."""

    def __init__(self, width):
        self.vectors = None

    def add(self, vectors):
        self.vectors = torch.from_numpy(vectors)

    def search(self, wanted, count):
        best = (torch.from_numpy(wanted) @ self.vectors.t()).topk(count, dim=1)
        return best.values.numpy(), best.indices.numpy()


@pytest.mark.parametrize("with_faiss", [False, True])
def test_search_is_exact(monkeypatch, with_faiss):
    monkeypatch.setitem(sys.modules, "faiss", SimpleNamespace(IndexFlatIP=ExactIndex) if with_faiss else None)
    monkeypatch.setattr(embedding, "_IMAGES_AT_ONCE", 7)
    torch.manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(40, 5, 8), dim=-1)
    wanted = torch.nn.functional.normalize(torch.randn(3, 8), dim=-1)
    best = embedding.search(Features([str(i) for i in range(40)], images, [], wanted, {}), wanted, 6)
    expected = similarity(images, wanted).t().topk(6, dim=1)
    assert torch.equal(best.numbers, expected.indices) and torch.allclose(best.scores, expected.values)


# ------------------------------------------------------------ capfilt


@pytest.fixture()
def captioner(model_config):
    """A run file of which the model writes captions (of random weights)."""
    model = {key: str(value) if isinstance(value, Path) else value for key, value in model_config().items()}
    config = {"model": model, "datasets": {"digits_caption": {}}, "run": {"task": "kvmod_captioning", "device": "cpu"}}
    OmegaConf.save(OmegaConf.create(config), "captioner.yaml")
    return "captioner.yaml"


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().split("\n") if line]


@pytest.mark.slow
def test_texts_are_written_judged_and_kept(run_file, captioner, capsys, monkeypatch):
    command = ["capfilt", "--cfg-path", run_file, "--split", "test", "--captioner", captioner, "--captions", "2"]
    command += ["--max-len", "5", "--block", "2", "--out"]
    assert cli.main([*command, "all", "--itm", "1e-9"]) == 0
    every = lines("all/kept.jsonl")
    given = [row for row in every if row["text_from"] == "data"]
    assert [(row["image"], row["caption"]) for row in given] == ROWS
    assert {row["image"] for row in every if row["text_from"] == "captioner"} == {name for name, _ in ROWS}
    assert all(-1 <= row["itc"] <= 1 and 0 <= row["itm"] <= 1 for row in every)

    middle = f"{statistics.median(row['itm'] for row in every):.4f}"
    whole = [*command, "whole", "--itm", middle]
    assert cli.main(whole) == 0
    kept, dropped = lines("whole/kept.jsonl"), lines("whole/dropped.jsonl")
    capsys.readouterr()
    assert kept == [row for row in every if row["itm"] >= float(middle)]
    wordless = lines("all/dropped.jsonl")  # of random weights
    assert {row["reason"] for row in wordless} <= {"no words"}
    low = [row for row in dropped if row["reason"] == f"itm {row.get('itm')} is below {float(middle)}"]
    assert low and len(kept) + len(low) == len(every) and len(dropped) == len(low) + len(wordless)

    # interrupted in the second block, and given again
    block = work.CapFilt._block
    with monkeypatch.context() as patch:

        def stopped(self, number, items):
            if number == 1:
                raise KeyboardInterrupt
            return block(self, number, items)

        patch.setattr(work.CapFilt, "_block", stopped)
        assert cli.main([*command, "again", "--itm", middle]) == 130
    assert sorted(path.name for path in Path("again/parts").iterdir()) == ["00000000.jsonl"]
    for rank in (1, 0):  # the rest by two ranks, one after the other
        with monkeypatch.context() as patch:
            patch.setattr(capfilt, "get_rank", lambda rank=rank: rank)
            patch.setattr(capfilt, "get_world_size", lambda: 2)
            assert cli.main([*command, "again", "--itm", middle, "--shards"][: -1 if rank else None]) == 0
    for name in ("kept.jsonl", "dropped.jsonl"):
        assert Path("again", name).read_bytes() == Path("whole", name).read_bytes()
    assert cli.main([*command, "again", "--itm", "0.9"]) == 2
    assert f"again: of another call before (itm was {float(middle)} and is 0.9)" in capsys.readouterr().err
    read_again(run_file, kept)


def read_again(run_file, kept):
    """What was kept, by the readers of tables and shards; and from those shards once more."""
    table = ["run.evaluate=true", "datasets.custom_retrieval.build_info.annotations.test=whole/kept.jsonl"]
    dataset = CustomRetrievalBuilder(load_config(run_file, table).datasets_cfg.custom_retrieval).build()["test"]
    told = {(row["image_name"], text) for row in dataset.annotation for text in row["caption"]}
    assert told == {(row["image"], row["caption"]) for row in kept}

    config = OmegaConf.load(run_file)
    size = config.datasets.custom_retrieval.vis_processor
    config.datasets = {"wds_caption": {"build_info": {"annotations": {"test": "again/shards"}}, "vis_processor": size}}
    OmegaConf.save(config, "shards.yaml")
    (test,) = WdsCaptionBuilder(load_config("shards.yaml", table[:1]).datasets_cfg.wds_caption).build().values()
    assert len(test) == len({row["image"] for row in kept})
    assert cli.main(["capfilt", "--cfg-path", "shards.yaml", "--split", "test", "--out", "third", "--itm", "0"]) == 0
    third = lines("third/kept.jsonl")
    assert sorted(row["caption"] for row in third) == sorted(row["caption"] for row in kept)
    assert all(Path("third/images", row["image"]).is_file() and "itm" not in row for row in third)
