"""Where a run stands: its position and sums, and the states of the random number generators.

All of it is plain values and tensors, so that a checkpoint is read without running code from it.
"""

import random
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Dict, List, Mapping, Optional, Tuple, cast

import numpy as np
import torch

__all__ = ["RunState", "get_rng_state", "set_rng_state"]


@dataclass
class RunState:
    """What changes while a run goes on, beside parameters, optimizer and randomness.

    Attributes:
        epoch: the epoch being trained, from 0; ``max_epoch`` when all are.
        batch: batches of it that are trained (of one rank, as all have as many).
        trained: whether it is trained and logged, so that only its validation is left.
        samples: samples of it that are trained, on all ranks.
        steps_counted, loss_sum: steps of the epoch, and their losses.
        part_sums: the single losses that these are made of, by name, where a model has several.
        norms_counted, grad_norm_sum, grad_norm_max: gradients' norms of the epoch.
        bad_samples: a line for each sample of the epoch that could not be read.
        bad_steps: steps of the whole run that were skipped for a loss or gradient that was not finite.
        best_agg_metric, best_epoch: of the first validation split.
        validations_since_best: for ``patience``.
    """

    epoch: int = 0
    batch: int = 0
    trained: bool = False
    samples: int = 0
    steps_counted: int = 0
    loss_sum: float = 0.0
    part_sums: Dict[str, float] = field(default_factory=dict)
    norms_counted: int = 0
    grad_norm_sum: float = 0.0
    grad_norm_max: float = 0.0
    bad_samples: List[str] = field(default_factory=list)
    bad_steps: int = 0
    best_agg_metric: Optional[float] = None
    best_epoch: Optional[int] = None
    validations_since_best: int = 0

    def start_epoch(self, epoch: int) -> None:
        """Stand before the first batch of ``epoch``; what concerns the whole run stays."""
        kept = ("bad_steps", "best_agg_metric", "best_epoch", "validations_since_best")
        for name, value in asdict(RunState(epoch=epoch)).items():
            if name not in kept:
                setattr(self, name, value)

    def mean_loss(self) -> float:
        """Of the epoch's steps so far."""
        return self.loss_sum / max(self.steps_counted, 1)

    def mean_parts(self) -> Dict[str, float]:
        """Of the single losses, likewise."""
        return {name: total / max(self.steps_counted, 1) for name, total in self.part_sums.items()}

    def to_dict(self) -> Dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_checkpoint(cls, checkpoint: Mapping[str, Any]) -> "RunState":
        """From what `to_dict` gave, under ``state``; or from LAVIS's entries, written at the end of an epoch."""
        if "state" in checkpoint:
            known = {f.name for f in fields(cls)}
            return cls(**{name: value for name, value in checkpoint["state"].items() if name in known})
        return cls(
            epoch=checkpoint["epoch"] + 1,
            best_agg_metric=checkpoint.get("best_agg_metric"),
            best_epoch=checkpoint.get("best_epoch"),
        )


def get_rng_state(device: torch.device) -> Dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, and of the GPU's if ``device`` is one."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = cast(Tuple[str, np.ndarray, int, int, float], np.random.get_state())
    return {
        "python": [version, torch.tensor(internal, dtype=torch.int64), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put back what `get_rng_state` gave; the GPU's only if there was and is one."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
