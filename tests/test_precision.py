import pytest
import torch

from lavis_kvmod.distributed import backend_for, launched_rank
from lavis_kvmod.precision import amp_dtype, amp_problems, needs_grad_scaler


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


def test_what_cannot_work_is_refused():
    assert "fp16 needs a GPU" in amp_problems("fp16", "cpu")[0]
    assert "no bf16" in amp_problems("bf16", "cuda", cuda_has_bf16=False)[0]
    assert "expected true, false, fp16 or bf16; got 'fp8'" in amp_problems("fp8", "cuda")[0]


def test_backend_and_rank():
    assert (backend_for("cuda"), backend_for("cpu")) == ("nccl", "gloo")
    assert launched_rank({}) is None
    assert launched_rank({"RANK": "3", "WORLD_SIZE": "4"}) == 3
