"""Which dtype a run computes in, and whether it needs a gradient scaler: decisions, apart from the hardware.

``run.amp`` is LAVIS's switch, with a choice added: ``true`` or ``fp16`` (with a GradScaler), ``bf16`` (without one),
``false``. Parameters that are trained are float32 in every case. What a part of the model computes in is `computes_in`.
"""

from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple

import torch
from torch import Tensor, nn

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
AMP_VALUES = (True, False, "fp16", "bf16")
_CPUINFO = Path("/proc/cpuinfo")


def amp_dtype(amp: Any, device_type: str) -> Optional[torch.dtype]:
    """The autocast dtype of a run, or None for none.

    LAVIS's ``amp: true`` means fp16 on a GPU; on the CPU, where fp16 has no fast kernels, it means nothing.
    """
    if amp in (False, None):
        return None
    if amp == "bf16":
        return torch.bfloat16
    return torch.float16 if device_type == "cuda" else None


def computes_in(stored: torch.dtype, surrounding: Optional[torch.dtype]) -> torch.dtype:
    """What a part of a model computes in, whose weights are stored in ``stored``, under ``surrounding`` autocast.

    ========================  ==============  ==============  ===============
    autocast (``run.amp``)    frozen, fp16    frozen, bf16    trained (fp32)
    ========================  ==============  ==============  ===============
    none                      fp16            bf16            fp32
    fp16                      fp16            fp16            fp16
    bf16                      bf16            bf16            bf16
    ========================  ==============  ==============  ===============

    So without autocast, and then without a gradient scaler, no gradient of a trained part is computed in fp16, whose
    small numbers are 0.
    """
    return stored if surrounding is None else surrounding


def converts(stored: Iterable[torch.dtype], computes: torch.dtype) -> bool:
    """Whether a part needs autocast to compute in ``computes``: not where all of its weights are stored in that.

    It then gives the same numbers without: norms, which autocast computes in float32 on a GPU, add up in float32 in any
    case, and what they give is rounded at once, not after it has been kept for the backward pass.
    """
    return any(dtype != computes for dtype in stored)


def stored_dtype(part: nn.Module) -> torch.dtype:
    """What the weights of matrices and convolutions are stored in; norms and biases may be in float32 all the same."""
    return _stored(part).get("matrix", torch.float32)


def stored_dtypes(part: nn.Module) -> List[torch.dtype]:
    """That, and what the weights of norms are stored in."""
    return list(_stored(part).values())


def _stored(part: nn.Module) -> Dict[str, torch.dtype]:
    """By the first matrix and the first norm: a part's others are stored as they are, and there are hundreds."""
    found: Dict[str, torch.dtype] = {}
    for module in part.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):
            found.setdefault("matrix" if weight.ndim > 1 else "norm", weight.dtype)
            if len(found) == 2:
                break
    return found


def surrounding_autocast(device_type: str) -> Optional[torch.dtype]:
    """The dtype of the autocast that is in force, or None."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


@contextmanager
def autocast(device_type: str, dtype: Optional[torch.dtype]) -> Iterator[None]:
    """``torch.autocast``, also for a device that is not there (PyTorch's then turns itself off); None for none."""
    if dtype is None:
        yield
        return
    before = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    torch.set_autocast_enabled(device_type, True)
    torch.set_autocast_dtype(device_type, dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device_type, before[0])
        torch.set_autocast_dtype(device_type, before[1])


@contextmanager
def no_autocast(device_type: str) -> Iterator[None]:
    """What is stored computes as it is stored, whatever surrounds."""
    before = torch.is_autocast_enabled(device_type)
    torch.set_autocast_enabled(device_type, False)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device_type, before)


def needs_grad_scaler(amp: Any, device_type: str) -> bool:
    """Only fp16 gradients underflow; bf16 has float32's range."""
    return amp_dtype(amp, device_type) is torch.float16


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bfloat16 matrices itself (AVX512-BF16, AMX, or Arm's)."""
    names = {"avx512_bf16", "amx_bf16", "bf16"}
    if hasattr(torch.cpu, "get_capabilities"):
        return any(present for name, present in torch.cpu.get_capabilities().items() if name in names)
    # An older PyTorch does not tell, but Linux does.
    listed = _CPUINFO.read_text().split() if _CPUINFO.is_file() else ()
    return not names.isdisjoint(listed)


def frozen_dtype_on_cpu(stored: torch.dtype, has_bf16: bool) -> torch.dtype:
    """How the CPU keeps a frozen weight: half precision as bfloat16 where it can compute in it, else float32.

    LAVIS makes everything float32, which doubles OPT. What is stored in float32 stays so.
    """
    if stored in (torch.float16, torch.bfloat16) and has_bf16:
        return torch.bfloat16
    return torch.float32


def cuda_capability() -> Optional[Tuple[int, int]]:
    """The compute capability of the GPU, or None where PyTorch finds none."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def amp_problems(amp: Any, device_type: str, cuda_has_bf16: bool = True) -> List[str]:
    """What is wrong with ``run.amp`` for this device."""
    if amp not in AMP_VALUES and amp is not None:
        return [f"run.amp: expected true, false, fp16 or bf16; got {amp!r}"]
    if amp == "fp16" and device_type == "cpu":
        return ["run.amp: fp16 needs a GPU; use bf16 or false on the CPU"]
    if amp == "bf16" and device_type == "cuda" and not cuda_has_bf16:
        return ["run.amp: this GPU has no bf16 (it needs compute capability 8.0); use fp16"]
    return []
