import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lavis_kvmod.models.vision.encoders.registry import BLIP2_FILES
from lavis_kvmod.weights import downloads, finding
from lavis_kvmod.weights import files as checkpoints
from lavis_kvmod.weights.files import CheckpointError
from lavis_kvmod.weights.finding import MissingWeightsError, WeightFile

URL = "https://127.0.0.1:9/never/there.pth"


def test_all_that_is_missing_is_told_at_once(tmp_path):
    there = tmp_path / "there.pth"
    torch.save({"a": torch.zeros(1)}, there)
    files = [
        WeightFile("image encoder", str(there), "model.vit_checkpoint"),
        WeightFile("checkpoint", "/nowhere/a.pth", "model.pretrained"),
        WeightFile("auxiliary encoder", URL, "model.aux_checkpoint"),
        WeightFile("language model", "./no-folder", "model.opt_model", is_hf_folder=True),
    ]
    with pytest.raises(MissingWeightsError) as caught:
        finding.require(files)
    lines = str(caught.value).splitlines()[1:]
    assert [line.strip(" -").split(":")[0] for line in lines] == [
        "checkpoint",
        "auxiliary encoder",
        "language model",
    ]
    assert "no such file /nowhere/a.pth; set model.pretrained to a local file" in lines[0]
    assert f"{URL} is not in the download cache and cannot be reached; set model.aux_checkpoint" in lines[1]
    assert "no such folder ./no-folder; set model.opt_model to a local folder" in lines[2]


def test_a_repository_is_not_a_file():
    told = WeightFile("pretrained checkpoint", "Salesforce/blip2-opt-2.7b", "model.pretrained").problem()
    assert "set model.pretrained to a local file; a Hugging Face repository is not downloaded for it, but" in told
    assert "repository" not in WeightFile("checkpoint", "weights/blip2.pth", "model.pretrained").problem()
    assert "repository" not in WeightFile("auxiliary encoder", "timm/resnet50", "model.aux_checkpoint").problem()


def test_what_is_in_the_download_cache_needs_no_network(served, monkeypatch):
    torch.save({"a": torch.zeros(1)}, served.folder / "there.pth")
    file = WeightFile("checkpoint", f"{served.url}/there.pth", "model.pretrained")
    cached = file.fetch()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    served.requests.clear()
    assert file.problem() is None
    assert file.fetch() == cached
    assert served.requests == []


def test_what_other_programs_downloaded_is_used_where_it_is_certain_to_be_the_same(tmp_path, monkeypatch):
    """By its bare name: what LAVIS has published, and a file that has the sum which stands in its name."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("lavis_kvmod.weights.downloads.reachable", lambda url: False)
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save({"a": torch.zeros(1)}, cache / "there.pth")
    digest = hashlib.sha256((cache / "there.pth").read_bytes()).hexdigest()
    for name in ("blip2_pretrained_opt2.7b.pth", f"b3-{digest[:8]}.pth", "b3-00000000.pth"):
        shutil.copy(cache / "there.pth", cache / name)

    def found(url):
        file = WeightFile("checkpoint", url, "model.pretrained")
        return None if file.problem() else file.fetch().name

    assert found(f"{BLIP2_FILES}/blip2_pretrained_opt2.7b.pth") == "blip2_pretrained_opt2.7b.pth"
    assert found(f"https://127.0.0.1:9/never/b3-{digest[:8]}.pth") == f"b3-{digest[:8]}.pth"
    assert found("https://127.0.0.1:9/never/b3-00000000.pth") is None  # another file's sum
    assert found("https://127.0.0.1:9/never/blip2_pretrained_opt2.7b.pth") is None  # another's address
    assert found(URL) is None


def test_two_urls_with_one_name_are_two_files(served):
    """Also where one run is resumed and then another."""
    for run in ("run1", "run2"):
        (served.folder / run).mkdir()
        checkpoints.save({"model": {"a": torch.zeros(1)}, "run": run}, served.folder / run / "checkpoint_best.pth")
    for key in ("model.finetuned", "run.resume_ckpt_path"):
        urls = {run: f"{served.url}/{run}/checkpoint_best.pth" for run in ("run1", "run2")}
        found = {run: WeightFile("checkpoint", url, key).fetch() for run, url in urls.items()}
        assert {run: checkpoints.read(path)["run"] for run, path in found.items()} == {"run1": "run1", "run2": "run2"}
        assert {path.name for path in found.values()} == {"checkpoint_best.pth"}
    assert [method for method, _ in served.requests].count("GET") == 2


@pytest.mark.parametrize("told", ["ETag", "Last-Modified"])
def test_a_file_that_changed_behind_its_url_is_fetched_again(served, caplog, told):
    file = WeightFile("checkpoint", f"{served.url}/last.pth", "model.finetuned")
    if told == "ETag":
        served.headers["ETag"] = '"1"'
    for epoch in (1, 1, 2):
        path = served.folder / "last.pth"
        if epoch == 2 and told == "ETag":
            served.headers["ETag"] = '"2"'
        checkpoints.save({"model": {"a": torch.zeros(1)}, "epoch": epoch}, path)
        os.utime(path, (epoch, epoch if told == "Last-Modified" else 1))
        assert checkpoints.read(file.fetch())["epoch"] == epoch
    assert [method for method, _ in served.requests].count("GET") == 2
    assert caplog.text.count("last.pth has changed on the server: it is downloaded again") == 1
    (served.folder / "last.pth").unlink()
    assert checkpoints.read(file.fetch())["epoch"] == 2  # a server that has it no more leaves what we have


def test_a_page_in_place_of_a_file_does_not_get_into_the_cache(served):
    file = WeightFile("checkpoint", f"{served.url}/blip2.pth", "model.pretrained")
    (served.folder / "blip2.pth").write_text("<!DOCTYPE html><html>Quota exceeded</html>")
    with pytest.raises(MissingWeightsError, match=r"downloading .*/blip2.pth failed \(what came is an HTML"):
        file.fetch()
    assert file.local_path() is None
    torch.save({"a": torch.zeros(1)}, served.folder / "blip2.pth")
    assert checkpoints.read(file.fetch())["a"] == 0


def test_files_and_folders_that_are_none_are_told_with_what_is_missing(files, tmp_path):
    """All at once, before anything is built: a folder's files are looked at as files are."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"
    (tmp_path / "eva.pth").write_text(pointer)
    shutil.copytree(files.opt, tmp_path / "opt")
    (tmp_path / "opt" / "pytorch_model.bin").write_text(pointer)
    shutil.copytree(files.opt, tmp_path / "no-tokenizer", ignore=shutil.ignore_patterns("merges.txt"))
    shutil.copytree(files.opt, tmp_path / "not-blip2")
    weights = [
        WeightFile("image encoder", str(tmp_path / "eva.pth"), "model.vit_checkpoint"),
        WeightFile("language model", str(tmp_path / "opt"), "model.opt_model", is_hf_folder=True),
        WeightFile("language model", str(tmp_path / "no-tokenizer"), "model.opt_model", is_hf_folder=True),
        WeightFile("language model", str(tmp_path / "eva.pth"), "model.opt_model", is_hf_folder=True),
        WeightFile("pretrained checkpoint", str(tmp_path / "not-blip2"), "model.pretrained"),
    ]
    with pytest.raises(CheckpointError) as caught:
        finding.require(weights)
    told = str(caught.value).splitlines()[1:]
    assert "model.vit_checkpoint: " in told[0] and "eva.pth (63 bytes) is not a readable checkpoint: it is a" in told[0]
    assert "model.opt_model: " in told[1] and "pytorch_model.bin" in told[1] and "a Git LFS pointer" in told[1]
    assert "no-tokenizer has no tokenizer: expected vocab.json and merges.txt in it" in told[2]
    assert "expected the folder of an OPT model, got the file" in told[3]
    assert "not-blip2: expected a blip-2 config with an opt text_config, got opt" in told[4]
    with pytest.raises(MissingWeightsError, match="no such file /nowhere.pth(.*\n)+.*a Git LFS pointer"):
        finding.require([WeightFile("checkpoint", "/nowhere.pth", "model.pretrained"), *weights])


def test_a_checkpoint_by_url(build, files, served):
    """Downloaded once; a file that is not there, or not the one that was meant, is told."""
    shutil.copy(files.blip2, served.folder / "blip2.pth")
    digest = hashlib.sha256(files.blip2.read_bytes()).hexdigest()
    url = f"{served.url}/blip2.pth"
    expected = build().state_dict()
    model = build(pretrained=f"{url}#sha256={digest}")
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    (served.folder / "blip2.pth").unlink()
    tuned = build(seed=4, load_finetuned=True, finetuned=f"{url}#sha256={digest}", pretrained=None)
    assert torch.equal(tuned.opt_proj.weight, model.opt_proj.weight)
    build(seed=5, pretrained=None).load_checkpoint(f"{url}#sha256={digest}")
    with pytest.raises(CheckpointError, match=f"blip2.pth is not the file that was meant: .* got {digest}"):
        build(pretrained=f"{url}#sha256={'0' * 64}")
    with pytest.raises(MissingWeightsError, match=f"{served.url}/none.pth is not in the download cache and cannot be"):
        build(pretrained=f"{served.url}/none.pth")


@pytest.mark.slow
def test_processes_that_want_the_same_file_download_it_once(served, tmp_path):
    """And none waits for another that has passed by: one may come when the file is there already."""
    torch.save({"a": torch.zeros(750_000)}, served.folder / "blip2.pth")
    code = f"""
from lavis_kvmod.weights.finding import WeightFile
print(WeightFile("checkpoint", "{served.url}/blip2.pth", "model.pretrained").fetch())
"""
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    told = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    (path,) = set(told)
    assert path.startswith(str(tmp_path)) and Path(path).stat().st_size > 3_000_000
    assert [method for method, _ in served.requests].count("GET") == 1


def test_offline_is_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    downloads.reachable.cache_clear()
    file = WeightFile("language model", "owner/name", "model.opt_model", is_hf_folder=True)
    assert "https://huggingface.co/owner/name is not in the download cache" in file.problem()
    downloads.reachable.cache_clear()
