import argparse
import os
import pickle
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lavis_kvmod.weights import files as checkpoints
from lavis_kvmod.weights import reading
from lavis_kvmod.weights.files import CheckpointError

STATE = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.zeros(2)}


class Payload:
    """What a malicious pickle does: run a command when it is opened."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_checkpoint_that_carries_code_is_refused_not_run(tmp_path, legacy):
    marker = tmp_path / "ran"
    path = tmp_path / "evil.pth"
    torch.save({"model": STATE, "x": Payload(marker)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="evil.pth carries code besides tensors .*system"):
        checkpoints.read(path)
    assert not marker.exists()
    plain = tmp_path / "plain.pth"
    plain.write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(CheckpointError, match="plain.pth"):
        checkpoints.read(plain)
    assert not marker.exists()


def test_truncated_and_foreign_files(tmp_path):
    torch.save(STATE, tmp_path / "good.pth")
    whole = (tmp_path / "good.pth").read_bytes()
    for name, content in {
        "half.pth": whole[: len(whole) // 2],
        "empty.pth": b"",
        "text.pth": b"<html>404</html>",
        "half.safetensors": b"\x10\0\0\0\0\0\0\0{",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            checkpoints.read(tmp_path / name)
        assert name in checkpoints.quick_problem(tmp_path / name)
    assert checkpoints.quick_problem(tmp_path / "good.pth") is None
    torch.save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "old.pth").read_bytes()
    for length in range(0, len(whole), 7):
        (tmp_path / "old.pth").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="old.pth"):
            checkpoints.read(tmp_path / "old.pth")
    with pytest.raises(CheckpointError, match="is a folder; expected a .pth or .safetensors file"):
        checkpoints.read(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such checkpoint: .*missing.pth"):
        checkpoints.read(tmp_path / "missing.pth")


def test_layouts(tmp_path):
    torch.save(STATE, tmp_path / "bare.pth")
    torch.save({"model": STATE, "epoch": 3}, tmp_path / "lavis.pth")
    save_file(STATE, str(tmp_path / "it.safetensors"))
    for name in ("bare.pth", "lavis.pth", "it.safetensors"):
        got = reading.read_weights(tmp_path / name)
        assert set(got) == set(STATE) and torch.equal(got["weight"], STATE["weight"])
    torch.save({"model": {"epoch": 3}}, tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="expected a state dict"):
        reading.read_weights(tmp_path / "none.pth")


@pytest.mark.parametrize("wrap", ["state_dict", "model_state_dict", "module.", "_orig_mod.", "module._orig_mod."])
def test_what_training_scripts_wrap_a_model_in(tmp_path, wrap):
    named = {f"{wrap}{name}": value for name, value in STATE.items()}
    inner = {"model": named} if wrap.endswith(".") else {"model": {wrap: STATE}}
    torch.save({**inner, "optimizer": {"state": {}}, "epoch": 3}, tmp_path / "wrapped.pth")
    got = reading.read_weights(tmp_path / "wrapped.pth")
    assert set(got) == set(STATE) and torch.equal(got["weight"], STATE["weight"])
    part = reading.read_weights(save({"a._orig_mod.weight": STATE["weight"]}, tmp_path / "part.pth"))
    assert set(part) == {"a.weight"}


def save(contents, path):
    torch.save(contents, path)
    return path


def test_plain_values_beside_the_tensors(tmp_path):
    """timm's training script saves its arguments, and others NumPy's numbers; NumPy 2 calls them by another name."""
    known = torch.serialization.get_safe_globals()
    beside = {"args": argparse.Namespace(model="resnet18", lr=0.1), "best": np.float64(71.2), "n": np.int64(3)}
    path = save({"state_dict": STATE, **beside, "flag": np.bool_(True), "half": np.float16(0.5)}, tmp_path / "timm.pth")
    for name, old, new in (
        ("one", b"numpy.core.multiarray", b"numpy.core.multiarray"),
        ("two", b"numpy.core.multiarray", b"numpy._core.multiarray"),
    ):
        content = checkpoints.read(repacked(path, tmp_path / f"{name}.pth", old, new))
        assert content["args"] == beside["args"] and content["best"] == beside["best"] and content["n"] == 3
        assert content["flag"] and content["half"] == 0.5
        assert set(reading.read_weights(tmp_path / f"{name}.pth")) == set(STATE)
    assert torch.serialization.get_safe_globals() == known


def repacked(path, to, old, new):
    """The same file with something else in its pickle."""
    with ZipFile(path) as source, ZipFile(to, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, content.replace(old, new) if name.endswith("data.pkl") else content)
    return to


def test_files_that_are_something_else_are_called_what_they_are(tmp_path):
    """And nobody is told to have their code run."""
    contents = {
        "lfs.pth": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n", "a Git LFS pointer, which"),
        "page.pth": (b"\n<!DOCTYPE html><html>Quota exceeded</html>", "an HTML (or XML) page"),
        "said.safetensors": ("Zugriff verweigert: müde".encode() * 100, "a text file that begins with 'Zugriff"),
        "keras.pth": (b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file"),
        "nothing.pth": (b"", "empty (0 bytes)"),
    }
    for name, (content, _) in contents.items():
        (tmp_path / name).write_bytes(content)
    save_file(STATE, str(tmp_path / "st.pth"))
    torch.save(STATE, tmp_path / "zip.safetensors")
    np.savez(tmp_path / "arrays.npz", a=np.zeros(2))
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(tmp_path / "program.pt"))
    expected = {
        **{name: kind for name, (_, kind) in contents.items()},
        "st.pth": "a safetensors file under another name: let its name end in .safetensors",
        "zip.safetensors": "a PyTorch file under another name: let its name end in .pth",
        "arrays.npz": "a NumPy archive (.npz)",
        "program.pt": "a TorchScript program",
    }
    for name, kind in expected.items():
        with pytest.raises(CheckpointError) as caught:
            checkpoints.read(tmp_path / name)
        assert f"is not a readable checkpoint: it is {kind}" in str(caught.value)
        assert checkpoints.quick_problem(tmp_path / name) == str(caught.value)
    (tmp_path / "strange.pth").write_bytes(bytes(range(1, 256)))
    with pytest.raises(CheckpointError) as caught:
        checkpoints.read(tmp_path / "strange.pth")
    assert "weights_only" not in str(caught.value) and "truncated, or of another kind; expected" in str(caught.value)


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "checkpoint.pth"
    checkpoints.save(STATE, path)
    with pytest.raises(Exception, match="pickle"):
        checkpoints.save({"model": STATE, "bad": lambda: None}, path)
    assert torch.equal(checkpoints.read(path)["weight"], STATE["weight"])
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_long_lists_of_keys_are_shortened():
    state = {**STATE, **{f"extra.{i:02}": torch.zeros(1) for i in range(20)}}
    with pytest.raises(CheckpointError, match=r"20 unexpected:\n    extra.00\n(.*\n)+    … and 8 more"):
        reading.load_weights(torch.nn.Linear(3, 2), state, source="file")
