"""The optimizer: which parameters share its settings, and whether it goes over them in one kernel."""

import inspect
from typing import Any, Dict, Iterable, List, Optional

import torch
from torch import nn

__all__ = ["adamw", "build_optimizer", "has_fused_adamw"]

# The first PyTorch whose fused AdamW also runs on the CPU.
_FUSED_ON_CPU = (2, 4)


def has_fused_adamw(device_types: Iterable[str], torch_version: str = torch.__version__) -> bool:
    """Whether AdamW can go over parameters on these devices in one kernel: on CUDA, and in newer versions on the CPU.

    It computes the same as a loop over the parameters, to rounding.
    """
    major, minor = (int(part) for part in torch_version.split(".")[:2])
    known = {"cuda"} | ({"cpu"} if (major, minor) >= _FUSED_ON_CPU else set())
    return set(device_types) <= known


def adamw(groups: List[Dict[str, Any]], **settings: Any) -> torch.optim.AdamW:
    """AdamW over parameter groups, fused where that is to be had."""
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return torch.optim.AdamW(groups, fused=has_fused_adamw(devices), **settings)


def build_optimizer(model: nn.Module, run_cfg: Any) -> Optional[torch.optim.AdamW]:
    """AdamW over the groups a model makes itself (``get_optimizer_params``, as in LAVIS main); None if it makes none.

    Of the run section: ``init_lr``, ``weight_decay``, ``beta2``, ``lr_layer_decay`` (the ViT's layer-wise decay, LAVIS
    main's name) and ``kv_lr_scale`` (a multiplier for the prefix generator).

    Raises:
        ValueError: if ``kv_lr_scale`` or ``lr_layer_decay`` is set and the model knows no such thing.
    """
    wanted = {"lr_scale": run_cfg.get("lr_layer_decay", None), "kv_lr_scale": run_cfg.get("kv_lr_scale", None)}
    wanted = {name: float(value) for name, value in wanted.items() if value is not None}
    make = getattr(model, "get_optimizer_params", None)
    known = inspect.signature(make).parameters if make is not None else {}
    for name, key in (("lr_scale", "lr_layer_decay"), ("kv_lr_scale", "kv_lr_scale")):
        if wanted.get(name, 1.0) != 1.0 and name not in known:
            raise ValueError(f"run.{key}: {type(model).__name__} has no such parameter groups; leave it out")
    if make is None:
        return None
    weight_decay, learning_rate = float(run_cfg.weight_decay), float(run_cfg.init_lr)
    groups = make(weight_decay=weight_decay, **{name: value for name, value in wanted.items() if name in known})
    betas = (0.9, float(run_cfg.get("beta2", 0.999)))
    return adamw(groups, lr=learning_rate, weight_decay=weight_decay, betas=betas)
