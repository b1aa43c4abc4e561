"""How much a piece of work computes, and how much this machine could: multiplications and additions of matrices."""

import contextlib
import time
from functools import lru_cache
from typing import Any, Callable, Dict, Iterator, List

import torch

__all__ = ["counted_flops", "matrix_peak"]


@contextlib.contextmanager
def counted_flops() -> Iterator[List[int]]:
    """Counts what is computed inside, forward and backward, by PyTorch's counter; the list then holds the number."""
    from torch.utils.flop_counter import FlopCounterMode

    found: List[int] = []
    counter: Any = FlopCounterMode(display=False, custom_mapping=_on_the_cpu())
    counter.mod_tracker = _NoModules()
    with counter:
        yield found
    found.append(int(counter.get_total_flops()))


def _on_the_cpu() -> Dict[Any, Any]:
    """What PyTorch's counter does not know: fused attention on a CPU."""
    from torch.utils import flop_counter

    aten, known = torch.ops.aten, flop_counter.flop_registry
    names: Dict[str, Any] = {
        "_scaled_dot_product_flash_attention_for_cpu": flop_counter.sdpa_flop_count,
        "_scaled_dot_product_flash_attention_for_cpu_backward": flop_counter.sdpa_backward_flop_count,
    }
    formulas = {getattr(aten, name): count for name, count in names.items() if hasattr(aten, name)}
    return {op: _of_shapes(count) for op, count in formulas.items() if op not in known}


def _of_shapes(count: Callable[..., int]) -> Callable[..., int]:
    """Its shapes alone: query, key and value, behind that of the gradient in the backward pass."""
    number = 4 if "backward" in count.__name__ else 3

    def formula(*shapes: Any, **others: Any) -> int:
        return count(*shapes[:number])

    return formula


class _NoModules(contextlib.nullcontext):
    """In the place of PyTorch's tracker of modules, whose hooks fail at a frozen part behind a trained one: everything
    is counted together."""

    parents = ("Global",)


@lru_cache(maxsize=None)
def matrix_peak(device: torch.device, dtype: torch.dtype, runs: int = 5) -> float:
    """FLOPs a second of one large product of matrices, the most that this machine gives; measured once a process."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(runs):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
