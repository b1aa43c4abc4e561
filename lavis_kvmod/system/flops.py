"""How much a piece of work computes, and how much this machine could: multiplications and additions of matrices."""

import contextlib
import time
from functools import lru_cache
from typing import Any, Callable, Dict, Iterator, List, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

__all__ = ["counted_flops", "matrix_peak"]


@contextlib.contextmanager
def counted_flops() -> Iterator[List[int]]:
    """Counts what is computed inside, forward and backward, by PyTorch's formulas; the list then holds the number.

    What is computed stays what it is, bit for bit: PyTorch's own counter replaces operations by others (SiLU's gradient
    is one), so that a run that begins with a counted batch would not go on as one that was never interrupted.
    """
    found: List[int] = []
    with _Counter() as counter:
        yield found
    found.append(counter.total)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self._formulas = _formulas()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = self._formulas.get(getattr(func, "overloadpacket", None))
        if formula is not None:
            shapes = tree_map_only(Tensor, lambda tensor: tensor.shape, (args, kwargs, result))
            self.total += int(formula(*shapes[0], **shapes[1], out_val=shapes[2]))
        return result


def _formulas() -> Dict[Any, Callable[..., int]]:
    """PyTorch's, by operation, and what its counter does not know: fused attention on a CPU."""
    from torch.utils import flop_counter

    aten = torch.ops.aten
    names: Dict[str, Callable[..., int]] = {
        "_scaled_dot_product_flash_attention_for_cpu": flop_counter.sdpa_flop_count,
        "_scaled_dot_product_flash_attention_for_cpu_backward": flop_counter.sdpa_backward_flop_count,
    }
    own = {getattr(aten, name): _of_shapes(count) for name, count in names.items() if hasattr(aten, name)}
    return {**own, **flop_counter.flop_registry}


def _of_shapes(count: Callable[..., int]) -> Callable[..., int]:
    """Its shapes alone: query, key and value, behind that of the gradient in the backward pass."""
    number = 4 if "backward" in count.__name__ else 3

    def formula(*shapes: Any, **others: Any) -> int:
        return count(*shapes[:number])

    return formula


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
