import pytest
import torch

from lavis_kvmod.system import precision
from lavis_kvmod.system.distributed import backend_for, launched_rank
from lavis_kvmod.system.precision import amp_dtype, amp_problems, cpu_has_bf16, needs_grad_scaler


@pytest.mark.parametrize(
    "amp, device, dtype, scaler",
    [
        (True, "cuda", torch.float16, True),
        ("fp16", "cuda", torch.float16, True),
        ("bf16", "cuda", torch.bfloat16, False),
        (False, "cuda", None, False),
        (None, "cuda", None, False),
        (True, "cpu", None, False),
        ("bf16", "cpu", torch.bfloat16, False),
        (False, "cpu", None, False),
    ],
)
def test_dtype_and_scaler(amp, device, dtype, scaler):
    assert amp_dtype(amp, device) is dtype
    assert needs_grad_scaler(amp, device) is scaler
    assert amp_problems(amp, device) == []


FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    "surrounding, of_fp16, of_bf16, of_trained",
    [(None, FP16, BF16, FP32), (FP16, FP16, FP16, FP16), (BF16, BF16, BF16, BF16)],
)
def test_what_each_part_computes_in(surrounding, of_fp16, of_bf16, of_trained):
    """Without autocast, and so without a scaler, the trained part is not computed in fp16."""
    assert [precision.computes_in(stored, surrounding) for stored in (FP16, BF16, FP32)] == [
        of_fp16,
        of_bf16,
        of_trained,
    ]


def test_stored_dtype_is_that_of_the_matrices():
    part = torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.Linear(4, 4).to(BF16))
    assert precision.stored_dtype(part) is BF16
    assert precision.stored_dtype(torch.nn.LayerNorm(4)) is FP32


def test_autocast_is_for_what_is_stored_otherwise():
    assert not precision.converts([BF16, BF16], BF16) and not precision.converts([FP32], FP32)
    assert precision.converts([BF16, FP32], BF16) and precision.converts([FP16], BF16)
    with precision.autocast("cpu", BF16):
        with precision.no_autocast("cpu"):
            assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype is FP32
        assert precision.surrounding_autocast("cpu") is BF16


def test_autocast_ends_where_it_began():
    assert precision.surrounding_autocast("cpu") is None
    with precision.autocast("cpu", BF16):
        assert precision.surrounding_autocast("cpu") is BF16
        with precision.autocast("cpu", None):
            assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype is BF16
    assert precision.surrounding_autocast("cpu") is None


def test_what_cannot_work_is_refused():
    assert "fp16 needs a GPU" in amp_problems("fp16", "cpu")[0]
    assert "no bf16" in amp_problems("bf16", "cuda", cuda_has_bf16=False)[0]
    assert "expected true, false, fp16 or bf16; got 'fp8'" in amp_problems("fp8", "cuda")[0]


@pytest.mark.parametrize("name, found", [("avx512_bf16", True), ("amx_bf16", True), ("bf16", True), ("avx2", False)])
def test_a_processor_with_bf16_is_known(monkeypatch, tmp_path, name, found):
    """By what PyTorch tells, and with one that does not, by what Linux does; else it is taken to have none."""
    capabilities = {"architecture": "any", "avx512_bf16": False, name: True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert cpu_has_bf16() is found
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.setattr(precision, "_CPUINFO", tmp_path / "cpuinfo")
    assert cpu_has_bf16() is False
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu sse2 {name} avx512_vnni\n")
    assert cpu_has_bf16() is found


def test_backend_and_rank():
    assert (backend_for("cuda"), backend_for("cpu")) == ("nccl", "gloo")
    assert launched_rank({}) is None
    assert launched_rank({"RANK": "3", "WORLD_SIZE": "4"}) == 3
