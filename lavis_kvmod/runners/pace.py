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
        world_size: of the ranks, each of which has as many images as this one.
        clock: monotonic, so that a clock that is set changes nothing.
    """

    def __init__(
        self,
        total: int,
        done: int,
        samples: int = 0,
        world_size: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._done, self._samples, self._world_size = total, done, samples, world_size
        self._images = 0
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

    def done_batch(self, images: int = 0) -> None:
        """It has been trained, and had so many images."""
        self._batches += 1
        self._images += images

    def facts(self, samples: int, device: torch.device, peak_share_of: float = 0.0) -> Dict[str, Any]:
        """For timing.txt: samples a second (``samples`` of the epoch are trained by now, on all ranks) and images a
        second, the share of time spent waiting for data, hours to go for all epochs (evaluations not counted), and the
        most memory held. ``peak_share_of`` is the seconds that a sample would take at the rate of a large product of
        matrices, the most this machine gives; with it, what share of that the run reaches."""
        seconds = max(self._clock() - self._start, 1e-9)
        left = self._total - self._done - self._batches
        facts = {
            "samples_per_second": round((samples - self._samples) / seconds, 3),
            "images_per_second": round(self._images * self._world_size / seconds, 3),
            "data_wait_share": round(self._waiting / seconds, 3),
            "hours_to_go": round(left * seconds / max(self._batches, 1) / 3600, 3),
            "memory_gib": round(resident_peak_gib(), 2),
        }
        if peak_share_of:
            share = (samples - self._samples) / seconds * peak_share_of / self._world_size
            facts["matrix_peak_share"] = round(share, 4)
        if device.type == "cuda":
            facts["gpu_memory_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
        return facts
