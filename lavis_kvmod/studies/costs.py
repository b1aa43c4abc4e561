"""What a trained arm costs: a step's time and memory, an answer's time, and the room it takes before the text."""

import time
from typing import Any, Callable, Dict, List, Optional

import torch
from lavis.datasets.data_utils import prepare_sample

from lavis_kvmod.memory.ledger import Ledger
from lavis_kvmod.runners.compiling import eagerly
from lavis_kvmod.runners.epochs import on_device

__all__ = ["costs"]

_ADAMW_STATES = 2


def costs(runner: Any, split: str) -> Dict[str, Optional[float]]:
    """Measured on a run that has ended, with its first training batch and the split's first batch.

    Returns:
        ``soft_prompt``: vectors before the text. ``step_seconds``: forward and backward pass of a batch, once: a study
        takes the median over its seeds. ``answer_seconds``: of one answer in a batch. ``peak_memory_gib`` of such a
        step: on a GPU what was allocated, on a CPU weights, gradients, AdamW's numbers and what operators allocate.
        What encoders do is in it where their features are not remembered.
    """
    model = runner.unwrap_dist_model(runner.model)
    step = _step(runner)
    peak = _peak(model, step, runner.device)  # also the first of all steps, which is not timed
    step_seconds = _seconds(step, runner.device)
    model.zero_grad(set_to_none=True)
    model.eval()
    return {
        "soft_prompt": getattr(model, "num_soft_prompt", None),
        "step_seconds": round(step_seconds, 4),
        "answer_seconds": _answer_seconds(runner, split),
        "peak_memory_gib": round(peak / 2**30, 3),
    }


def _step(runner: Any) -> Callable[[], None]:
    loader = runner.train_loader
    loader.set_epoch(0, 0)
    samples = on_device(next(iter(loader)), runner.device)
    samples.update(epoch=0, num_iters_per_epoch=len(loader), iters=0)
    samples.pop("bad_samples", None)
    model = runner.unwrap_dist_model(runner.model).train()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with runner.autocast():
            loss = runner.task.train_step(model=model, samples=dict(samples))
        (loss[0] if isinstance(loss, tuple) else loss).backward()

    return step


def _peak(model: Any, step: Callable[[], None], device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    tensors = [*model.parameters(), *model.buffers()]
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    ledger = Ledger(device.type)
    ledger.ignore(tensors)
    with eagerly(), ledger:
        step()
    gradients = {ledger.number(p.grad) for p in model.parameters() if p.grad is not None}
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return weights + (1 + _ADAMW_STATES) * trained + ledger.peak(besides=gradients)


def _answer_seconds(runner: Any, split: str) -> Optional[float]:
    model = runner.unwrap_dist_model(runner.model)
    samples = prepare_sample(dict(next(iter(runner.dataloaders[split]))), cuda_enabled=runner.cuda_enabled)
    answers: List[Any] = []

    def answer() -> None:
        with torch.no_grad(), runner.autocast():
            answers[:] = runner.task.valid_step(model=model, samples=samples)

    # Not for the first time: this split has just been answered.
    return round(_seconds(answer, runner.device) / max(len(answers), 1), 6)


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start
