import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lavis_kvmod.weights import finding
from lavis_kvmod.weights.files import CheckpointError
from lavis_kvmod.weights.finding import MissingWeightsError, WeightFile

URL = "https://127.0.0.1:9/never/there.pth"


def test_all_that_is_missing_is_told_at_once(tmp_path):
    there = tmp_path / "there.pth"
    there.write_bytes(b"x")
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


def test_what_is_in_the_download_cache_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub" / "checkpoints" / "there.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"x")
    file = WeightFile("checkpoint", URL, "model.pretrained")
    assert file.problem() is None
    assert file.fetch() == cached


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


def test_processes_that_want_the_same_file_download_it_once(served, tmp_path):
    """And none waits for another that has passed by: one may come when the file is there already."""
    (served.folder / "blip2.pth").write_bytes(bytes(3_000_000))
    code = f"""
from lavis_kvmod.weights.finding import WeightFile
print(WeightFile("checkpoint", "{served.url}/blip2.pth", "model.pretrained").fetch())
"""
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    told = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    (path,) = set(told)
    assert path.startswith(str(tmp_path)) and Path(path).stat().st_size == 3_000_000
    assert [method for method, _ in served.requests].count("GET") == 1


def test_offline_is_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    finding._reachable.cache_clear()
    file = WeightFile("language model", "owner/name", "model.opt_model", is_hf_folder=True)
    assert "https://huggingface.co/owner/name is not in the download cache" in file.problem()
    finding._reachable.cache_clear()
