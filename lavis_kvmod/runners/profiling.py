"""``run.profiler``: what PyTorch's profiler sees of a few batches, written into the run's folder."""

import logging
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from lavis_kvmod.system.distributed import get_rank
from lavis_kvmod.system.schema import Settings, key

__all__ = ["BatchProfiler", "ProfilerSettings"]


class ProfilerSettings(Settings):
    """The keys of ``run.profiler``."""

    skip: int = key(5, "batches of this process before it, in which kernels are chosen and caches fill", ge=1)
    batches: int = key(3, "batches that are looked at", gt=0)


class BatchProfiler:
    """Looks at some batches of this process: ``profile/trace-rank0.json`` for chrome://tracing or ui.perfetto.dev, and
    ``profile/operators-rank0.txt``, where the time goes by operator.

    Args:
        wanted: ``run.profiler``; false does nothing.
        folder: the run's.
        device: what is computed on.
    """

    def __init__(self, wanted: Union[bool, dict], folder: Path, device: torch.device):
        self._folder, self._device = folder / "profile", device
        self._profile: Optional[Any] = None
        if not wanted:
            return
        settings = ProfilerSettings.of(wanted if isinstance(wanted, dict) else {})
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=settings.skip - 1, warmup=1, active=settings.batches, repeat=1),
            on_trace_ready=self._write,
        )
        self._profile.start()

    def step(self) -> None:
        """A batch is done."""
        if self._profile is not None:
            self._profile.step()

    def close(self) -> None:
        """No more batches."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _write(self, seen: Any) -> None:
        self._folder.mkdir(exist_ok=True)
        name = f"rank{get_rank()}"
        seen.export_chrome_trace(str(self._folder / f"trace-{name}.json"))
        order = f"self_{self._device.type}_time_total"
        table = seen.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=60)
        (self._folder / f"operators-{name}.txt").write_text(table, encoding="utf-8")
        logging.info("profiler: a trace and a table of operators in %s", self._folder)
