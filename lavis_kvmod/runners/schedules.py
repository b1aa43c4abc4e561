"""LAVIS's learning-rate schedules, with a warm-up that ends where it says and a multiplier for each group.

LAVIS warms up in epoch 0 alone: a warm-up longer than that breaks off, and the rate jumps (common/optims.py:40-57). It
counts batches, also those that only accumulate gradients; here ``warmup_steps`` counts optimizer steps, over epochs.
Where the warm-up ends inside epoch 0 without accumulation, every rate is LAVIS's.
"""

from typing import Any, Dict

from torch.optim import Optimizer

__all__ = ["Schedule"]


class Schedule:
    """Sets the rates of an optimizer before each step, by a LAVIS scheduler.

    The rates are a function of the position alone, so a resumed run needs no state of it. After the warm-up the rate is
    that of the epoch, as in LAVIS; in epoch 0 it stays at ``init_lr``.

    Args:
        scheduler: LAVIS's, with ``step(cur_epoch=…, cur_step=…)``, which sets one rate for all groups.
        optimizer: whose groups may carry an ``lr_scale``, a multiplier of that rate.
    """

    def __init__(self, scheduler: Any, optimizer: Optimizer):
        self._scheduler = scheduler
        self._optimizer = optimizer

    def set(self, *, epoch: int, step: int, steps_per_epoch: int) -> None:
        """Set the rates for optimizer step ``step`` of ``epoch``, both from 0."""
        steps_done = epoch * steps_per_epoch + step
        warming_up = steps_done < (getattr(self._scheduler, "warmup_steps", 0) or 0)
        # LAVIS's schedulers warm up when told that it is epoch 0, to the step they are told.
        self._scheduler.step(cur_epoch=0 if warming_up else epoch, cur_step=steps_done if warming_up else step)
        for group in self._optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)

    def rates(self) -> Dict[str, float]:
        """Under ``lr`` the unscaled rate, and that of each named group which has a multiplier."""
        groups = self._optimizer.param_groups
        scaled = {g["name"]: g["lr"] for g in groups if g.get("lr_scale", 1.0) != 1.0 and "name" in g}
        first = groups[0]
        return {"lr": first["lr"] / first.get("lr_scale", 1.0), **scaled}
