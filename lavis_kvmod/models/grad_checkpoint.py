"""Gradient checkpointing of a stack of layers: memory for time (arXiv 1604.06174)."""

from functools import partial
from typing import Any, Callable, Iterable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_in_backward(layers: Iterable[nn.Module]) -> None:
    """Have each layer keep its input alone and compute the rest again in the backward pass; results stay equal.

    LAVIS's own switches do not work: its EVA calls ``checkpoint`` as PyTorch no longer allows (eva_vit.py:337), and
    its OPT checkpoints in training mode only (modeling_opt.py:735), which a frozen language model never is in.
    """
    for layer in layers:
        layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
