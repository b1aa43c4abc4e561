import os
import pickle

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
