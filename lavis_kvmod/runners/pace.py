"""How fast a run goes, where the time goes, and how long it will take."""

import time
from typing import Any, Callable, Dict

import torch

from lavis_kvmod.system.progress import resident_peak_gib

__all__ = ["Pace"]


class Pace:
    """Times the batches of an epoch.

    Args:
        total: batches of the whole run.
        done: those that were trained before.
        samples: samples of this epoch that were trained before.
        clock: monotonic, so that a clock that is set changes nothing.
    """

    def __init__(self, total: int, done: int, samples: int = 0, clock: Callable[[], float] = time.monotonic):
        self._total, self._done, self._samples = total, done, samples
        self._clock = clock
        self._start = self._since = clock()
        self._waiting = 0.0
        self._batches = 0

    def ask_for_data(self) -> None:
        """The next batch is waited for from now on, as the first is from the start."""
        self._since = self._clock()

    def got_data(self) -> None:
        """A batch has arrived."""
        self._waiting += self._clock() - self._since

    def done_batch(self) -> None:
        """It has been trained."""
        self._batches += 1

    def facts(self, samples: int, device: torch.device) -> Dict[str, Any]:
        """For timing.txt: samples a second (``samples`` of the epoch are trained by now, on all ranks), the share of
        time spent waiting for data, hours to go for all epochs (evaluations not counted), and the most memory held."""
        seconds = max(self._clock() - self._start, 1e-9)
        left = self._total - self._done - self._batches
        facts = {
            "samples_per_second": round((samples - self._samples) / seconds, 3),
            "data_wait_share": round(self._waiting / seconds, 3),
            "hours_to_go": round(left * seconds / max(self._batches, 1) / 3600, 3),
            "memory_gib": round(resident_peak_gib(), 2),
        }
        if device.type == "cuda":
            facts["gpu_memory_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
        return facts
