"""Which parameters share an optimizer's settings."""

import inspect
from typing import Any, Optional

import torch
from torch import nn

__all__ = ["build_optimizer"]


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
    return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=weight_decay, betas=betas)
