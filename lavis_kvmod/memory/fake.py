"""Running a model on a GPU that is not there: fake tensors, and what they need here."""

import warnings
from contextlib import contextmanager, nullcontext
from typing import Any, Dict, Iterator, List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_HALF = (torch.float16, torch.bfloat16)


@contextmanager
def fake_device(
    model: nn.Module, device: str, num_labels: int = 0, half: Optional[torch.dtype] = None
) -> Iterator[None]:
    """Inside, ``model`` lies on ``device`` and new tensors have shape and dtype but no memory.

    Args:
        model: may be on the ``meta`` device; its parameters and buffers are replaced by fake ones, for good;
            what modules share they no longer do.
        device: ``cuda`` or ``cpu``, there or not. On the former the forward pass runs, not the backward one.
        num_labels: what ``nonzero`` finds: the one number in a step that hangs on the data.
        half: makes parameters that are stored in another half precision this one.
    """
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True), _Nonzero(num_labels):
        warnings.simplefilter("ignore")
        _replace_by_fakes(model, device, half)
        with _FusedAttention() if device == "cuda" else nullcontext():
            yield


def _replace_by_fakes(model: nn.Module, device: str, half: Optional[torch.dtype]) -> None:
    for module in model.modules():
        tables: List[Dict[str, Any]] = [module._parameters, module._buffers]
        for tensors in tables:
            for name, old in [item for item in tensors.items() if item[1] is not None]:
                dtype = half if half is not None and old.dtype in _HALF else old.dtype
                new = torch.empty(old.shape, dtype=dtype, device=device)
                is_parameter = isinstance(old, nn.Parameter)
                tensors[name] = nn.Parameter(new, requires_grad=old.requires_grad) if is_parameter else new


class _Nonzero(TorchDispatchMode):
    """Tells how many elements are not zero, which fake tensors do not know."""

    def __init__(self, count: int):
        super().__init__()
        self._count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty((self._count, args[0].ndim), dtype=torch.long)
        return func(*args, **(kwargs or {}))


class _FusedAttention(TorchFunctionMode):
    """The kernels that a GPU takes for ``scaled_dot_product_attention``, which keep no attention map; where there is no
    GPU, PyTorch would take the one that does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _fused_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Optional[Tensor] = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal)[0]
    scores = (*query.shape[:-1], key.shape[-2])
    mask = attn_mask.expand(scores)
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, mask, False, dropout_p)[0]
