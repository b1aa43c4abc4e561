"""One optimizer step: over several batches, several ranks, and in spite of a batch that gives no number.

The loss of a step is the mean over all its target tokens, whichever batch and rank they are in. A model that says
over how much weight its loss is a mean (``loss_weight`` beside ``loss``) has its batches weighed by that; others' count
1 each. With weights w and losses l, the step's gradient is ∇ Σ w·l / Σ w, so that accumulated batches, and those of
several ranks, give what one large batch gives. A single batch on a single process is left as it is, bit for bit.
"""

import contextlib
import logging
import math
from typing import Any, Callable, ContextManager, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lavis_kvmod.datasets.loading.loader import PADDING
from lavis_kvmod.system.distributed import all_reduce_tensor, gather

__all__ = ["GradientStep", "StepResult"]


class StepResult(NamedTuple):
    """The loss over all batches and ranks, and the norm of its gradient before clipping; ``problem`` says why there was
    no step, if there was none. ``counts``: the sums of what was counted, over batches and ranks. ``parts``: the losses
    that it is the sum of, where a model has several."""

    loss: float
    grad_norm: float
    problem: Optional[str] = None
    counts: Sequence[float] = ()
    parts: Mapping[str, float] = {}


class _Batch(NamedTuple):
    """What is kept of a batch until the step is taken; scalars that nobody has waited for."""

    loss: Tensor
    weight: Tensor
    ids: Optional[Tuple[str, List[Any]]]
    parts: Mapping[str, Tensor]


class GradientStep:
    """Adds up the gradients of a step's batches, and takes the step.

    Between two steps the GPU is waited for once, and the ranks exchange numbers once: whether a loss was not finite is
    seen when the step is due, by the norm of its gradient and the sum of its losses.

    Args:
        model: as wrapped for several processes.
        inner: the model inside the wrapper, whose output carries ``loss_weight``.
        train_step: the task's, ``(model=…, samples=…) -> loss`` (or a tuple that begins with it, as in LAVIS main).
        optimizer, scaler: the scaler may be None.
        autocast: gives the context to compute in.
        max_grad_norm: clip to this norm; None for no clipping.
        usual_weight: about the ``loss_weight`` of a batch. Losses are divided by it, so that gradients keep their size
            for a scaler; what it is changes no result, as it is taken as a power of two.
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
        autocast: Callable[[], ContextManager] = contextlib.nullcontext,
        max_grad_norm: Optional[float] = None,
        usual_weight: float = 1.0,
        world_size: int = 1,
        device: torch.device,
    ):
        self._model, self._inner = model, inner
        self._train_step = train_step
        self._optimizer, self._scaler = optimizer, scaler
        self._autocast = autocast
        self._max_grad_norm = max_grad_norm
        self._usual_weight = 2.0 ** round(math.log2(usual_weight))
        self._world_size, self._device = world_size, device
        self._loss_weight: Any = None
        self._parts: Dict[str, Tensor] = {}
        inner.register_forward_hook(self._remember_output)
        self._checked_gradients = False
        self._begin()

    def _begin(self) -> None:
        self._batches: List[_Batch] = []
        self._counts: List[float] = []
        self._divisor: Optional[float] = None  # of the losses; None where they are left as they are

    def _remember_output(self, module: nn.Module, args: Any, output: Any) -> None:
        """``loss_weight``, and the single losses: ``loss_itc``, … (ordered by name, so that all ranks agree)."""
        given = output if isinstance(output, dict) else {}
        self._loss_weight = given.get("loss_weight")
        names = sorted(name for name in given if name.startswith("loss_") and name != "loss_weight")
        self._parts = {name: given[name].detach() for name in names if isinstance(given[name], Tensor)}

    def add(self, samples: Dict[str, Any], *, num_batches: int, is_last: bool, counts: Sequence[float]) -> None:
        """Compute one batch and add its gradient.

        Args:
            samples: the batch, on the device.
            num_batches: how many batches this step has.
            is_last: whether this is the step's last.
            counts: numbers to be added up over the step's batches and all ranks, as there is an exchange anyway.
        """
        is_padding = bool(samples.pop(PADDING, False))
        with self._exchange_of_gradients(is_last):
            with self._autocast():
                self._loss_weight, self._parts = None, {}
                loss = self._train_step(model=self._model, samples=samples)
                loss = loss[0] if isinstance(loss, tuple) else loss
            weight = self._weight(loss.detach(), is_padding)
            self._batches.append(_Batch(loss.detach(), weight, _ids(samples), self._parts))
            self._counts = [a + b for a, b in zip(self._counts or [0.0] * len(counts), counts)]
            if self._world_size > 1 or num_batches > 1:
                self._divisor = 1.0 if self._loss_weight is None else self._usual_weight
                loss = loss * (weight / self._divisor)
            (loss if self._scaler is None else self._scaler.scale(loss)).backward()

    def _exchange_of_gradients(self, is_last: bool) -> ContextManager:
        """Between ranks, once a step."""
        if isinstance(self._model, DistributedDataParallel) and not is_last:
            return self._model.no_sync()
        return contextlib.nullcontext()

    def _weight(self, loss: Tensor, is_padding: bool) -> Tensor:
        if is_padding or self._loss_weight is None:
            return torch.full((), 0.0 if is_padding else 1.0, device=loss.device)
        return torch.as_tensor(self._loss_weight, device=loss.device).detach().float()

    def finish(self) -> StepResult:
        """Take the step, unless a loss or the gradient is not finite; the gradients are then dropped."""
        try:
            self._check_gradients()
            if self._scaler is not None:
                self._scaler.unscale_(self._optimizer)
            facts = self._facts()
            trained = [p for group in self._optimizer.param_groups for p in group["params"]]
            if self._divisor is not None:
                # DDP has taken the mean over ranks of gradients that were divided.
                weight = facts[1]
                factor = torch.where(weight > 0, self._divisor * self._world_size / weight, torch.ones_like(weight))
                torch._foreach_mul_([p.grad for p in trained if p.grad is not None], factor)
            norm = self._clip(trained)
            # Here the GPU is waited for.
            norm, num_bad, weight, loss, *more = torch.cat([norm.detach().double().view(1), facts]).tolist()
            problem = self._problem() if num_bad else self._step(norm)
            counts, parts = more[: len(self._counts)], more[len(self._counts) :]
            means = {name: part / (weight or 1.0) for name, part in zip(self._batches[0].parts, parts)}
            return StepResult(loss / (weight or 1.0) if not num_bad else math.nan, norm, problem, counts, means)
        finally:
            self._optimizer.zero_grad()
            self._begin()

    def _facts(self) -> Tensor:
        """Over all batches and ranks: how many losses are not finite, the sum of the weights, that of the losses times
        their weights, the counts, and the sums of single losses. (3 + counts + parts,), on the device."""
        losses = torch.stack([batch.loss.double() for batch in self._batches])
        weights = torch.stack([batch.weight.double() for batch in self._batches])
        is_finite = torch.isfinite(losses)
        sums = [(~is_finite).sum(), weights.sum(), torch.where(is_finite, losses * weights, 0.0).sum()]
        counts = torch.tensor(self._counts, dtype=torch.float64).to(losses.device, non_blocking=True)
        parts = [
            (torch.stack([batch.parts[name].double() for batch in self._batches]) * weights).nansum()
            for name in self._batches[0].parts
        ]
        scalars = torch.stack([each.double() for each in [*sums, *parts]])
        return all_reduce_tensor(torch.cat([scalars[:3], counts, scalars[3:]]))

    def _problem(self) -> str:
        """Which losses are not finite, on all ranks. The scaler's scale stays: it is none of its affairs."""
        if self._scaler is not None:
            self._scaler.update(self._scaler.get_scale())
        read = [(batch.loss.item(), _named(batch.ids)) for batch in self._batches]
        return "; ".join(gather([f"the loss is {loss} ({name})" for loss, name in read if not math.isfinite(loss)]))

    def _step(self, norm: float) -> Optional[str]:
        """What keeps the step from being taken, if anything does."""
        if self._scaler is None:
            if not math.isfinite(norm):
                return f"the norm of the gradient is {norm}"
            self._optimizer.step()
            return None
        self._scaler.step(self._optimizer)  # takes no step where a gradient is not finite, and scales less
        self._scaler.update()
        if not math.isfinite(norm) and self._scaler.get_scale() < 1:  # no overflow that a smaller scale mends
            return f"the norm of the gradient is {norm}, whatever the losses' scale"
        return None

    def _clip(self, parameters: List[nn.Parameter]) -> Tensor:
        limit = math.inf if self._max_grad_norm is None else self._max_grad_norm
        return torch.nn.utils.clip_grad_norm_(parameters, limit)

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


def _ids(samples: Dict[str, Any]) -> Optional[Tuple[str, List[Any]]]:
    for key in ("instance_id", "question_id", "image_id", "image_key", "text_input"):
        if key in samples:
            return key, list(samples[key])[:8]
    return None


def _named(ids: Optional[Tuple[str, List[Any]]]) -> str:
    return "its samples carry no id" if ids is None else f"{ids[0]} {ids[1]}"
