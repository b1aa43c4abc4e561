"""One optimizer step: over several batches, several ranks, and in spite of a batch that gives no number.

The loss of a step is the mean over all its target tokens, whichever batch and rank they are in. A model that says
over how much weight its loss is a mean (``loss_weight`` beside ``loss``) has its batches weighed by that; others' count
1 each. With weights w and losses l, the step's gradient is ∇ Σ w·l / Σ w, so that accumulated batches, and those of
several ranks, give what one large batch gives. A single batch on a single process is left as it is, bit for bit.
"""

import contextlib
import logging
import math
from typing import Any, Callable, ContextManager, Dict, List, NamedTuple, Optional, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lavis_kvmod.datasets.loading.loader import PADDING
from lavis_kvmod.system.distributed import all_reduce_sum, gather

__all__ = ["GradientStep", "StepResult", "identify"]


class StepResult(NamedTuple):
    """The loss over all batches and ranks, and the norm of its gradient before clipping; ``problem`` says why there was
    no step, if there was none."""

    loss: float
    grad_norm: float
    problem: Optional[str] = None


class GradientStep:
    """Adds up the gradients of a step's batches, and takes the step.

    Args:
        model: as wrapped for several processes.
        inner: the model inside the wrapper, whose output carries ``loss_weight``.
        train_step: the task's, ``(model=…, samples=…) -> loss`` (or a tuple that begins with it, as in LAVIS main).
        optimizer, scaler: the scaler may be None.
        autocast: gives the context to compute in.
        max_grad_norm: clip to this norm; None for no clipping.
        world_size, device: as usual.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        inner: nn.Module,
        train_step: Callable[..., Any],
        optimizer: Optimizer,
        scaler: Optional[torch.amp.GradScaler] = None,
        autocast: Callable[[], Any] = contextlib.nullcontext,
        max_grad_norm: Optional[float] = None,
        world_size: int = 1,
        device: torch.device,
    ):
        self._model, self._inner = model, inner
        self._train_step = train_step
        self._optimizer, self._scaler = optimizer, scaler
        self._autocast = autocast
        self._max_grad_norm = max_grad_norm
        self._world_size, self._device = world_size, device
        self._loss_weight: Optional[Tensor] = None
        inner.register_forward_hook(self._remember_loss_weight)
        self._checked_gradients = False
        self._begin()

    def _begin(self) -> None:
        # The first batch's mean weight over ranks: losses are divided by it, so that gradients keep their size.
        self._reference: Optional[float] = None
        self._total_weight, self._total_loss = 0.0, 0.0
        self._problems: List[str] = []

    def _remember_loss_weight(self, module: nn.Module, args: Any, output: Any) -> None:
        self._loss_weight = output.get("loss_weight") if isinstance(output, dict) else None

    def add(self, samples: Dict[str, Any], *, num_batches: int, is_last: bool, counts: Sequence[float]) -> List[float]:
        """Compute one batch and add its gradient. Returns the sums of ``counts``.

        Args:
            samples: the batch, on the device.
            num_batches: how many batches this step has.
            is_last: whether this is the step's last.
            counts: numbers to be added up over all ranks, as there is an exchange anyway.
        """
        is_padding = bool(samples.pop(PADDING, False))
        with self._exchange_of_gradients(is_last):
            with self._autocast():
                self._loss_weight = None
                loss = self._train_step(model=self._model, samples=samples)
                loss = loss[0] if isinstance(loss, tuple) else loss
            value = loss.item()
            weight = 0.0 if is_padding else 1.0 if self._loss_weight is None else float(self._loss_weight)
            is_bad = not math.isfinite(value)
            weighted = 0.0 if is_bad else weight * value
            bad, weight_sum, loss_sum, *sums = all_reduce_sum([is_bad, weight, weighted, *counts], self._device)
            if bad:
                self._note(f"the loss is {value}" if is_bad else None, samples)
            elif not self._problems:
                self._total_weight += weight_sum
                self._total_loss += loss_sum
                self._backward(loss, weight, weight_sum, alone=self._world_size == 1 and num_batches == 1)
        return sums

    def _exchange_of_gradients(self, is_last: bool) -> ContextManager:
        """Between ranks, once a step."""
        if isinstance(self._model, DistributedDataParallel) and not is_last:
            return self._model.no_sync()
        return contextlib.nullcontext()

    def _note(self, problem: Optional[str], samples: Dict[str, Any]) -> None:
        told = gather([] if problem is None else [f"{problem} ({identify(samples)})"])
        self._problems.extend(told)

    def _backward(self, loss: Tensor, weight: float, weight_sum: float, alone: bool) -> None:
        if not alone:
            if self._reference is None:
                self._reference = weight_sum / self._world_size or 1.0
            loss = loss * (weight / self._reference)
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()

    def finish(self) -> StepResult:
        """Take the step, unless a loss or the gradient is not finite; the gradients are then dropped."""
        try:
            if self._problems:
                return StepResult(math.nan, math.nan, "; ".join(self._problems))
            loss = self._total_loss / (self._total_weight or 1.0)
            self._check_gradients()
            trained = [p for group in self._optimizer.param_groups for p in group["params"]]
            if self._scaler is not None:
                self._scaler.unscale_(self._optimizer)
            if self._reference is not None and self._total_weight:
                # DDP has taken the mean over ranks of gradients that were divided by the reference.
                factor = self._reference * self._world_size / self._total_weight
                if factor != 1:
                    torch._foreach_mul_([p.grad for p in trained if p.grad is not None], factor)
            norm = self._clip(trained)
            if self._scaler is not None:  # it takes no step where a gradient is not finite, and scales less
                self._scaler.step(self._optimizer)
                self._scaler.update()
                if not math.isfinite(norm) and self._scaler.get_scale() < 1:  # no overflow that a smaller scale mends
                    return StepResult(loss, norm, f"the norm of the gradient is {norm}, whatever the losses' scale")
            elif math.isfinite(norm):
                self._optimizer.step()
            else:
                return StepResult(loss, norm, f"the norm of the gradient is {norm}")
            return StepResult(loss, norm)
        finally:
            self._optimizer.zero_grad()
            self._begin()

    def _clip(self, parameters: List[nn.Parameter]) -> float:
        limit = math.inf if self._max_grad_norm is None else self._max_grad_norm
        return float(torch.nn.utils.clip_grad_norm_(parameters, limit))

    def _check_gradients(self) -> None:
        """At the first step: does everything that is trained get a gradient?

        Raises:
            RuntimeError: with several processes, which would wait for it for ever.
        """
        if self._checked_gradients:
            return
        self._checked_gradients = True
        without = [n for n, p in self._inner.named_parameters() if p.requires_grad and p.grad is None]
        if not without:
            return
        message = f"{len(without)} trained parameters got no gradient from the first step: {', '.join(without[:12])}"
        if self._world_size > 1:
            raise RuntimeError(f"{message}; freeze them (requires_grad_(False)), or use them in the loss")
        logging.warning("%s; they will not change", message)


def identify(samples: Dict[str, Any]) -> str:
    """The ids of a batch's samples, as far as it carries any."""
    for key in ("instance_id", "question_id", "image_id", "image_key", "text_input"):
        if key in samples:
            return f"{key} {list(samples[key])[:8]}"
    return "its samples carry no id"
