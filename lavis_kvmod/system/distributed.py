"""One process or many: every collective here is a no-op without a process group."""

import contextlib
import datetime
import os
from typing import Any, Callable, Iterator, List, Mapping, Optional, Sequence

import torch
import torch.distributed as dist
from lavis.common.dist_utils import get_rank, get_world_size, is_dist_avail_and_initialized

# Minutes after which a rank gives up waiting for the others: rank 0 may download weights meanwhile.
DEFAULT_TIMEOUT = 60


def backend_for(device_type: str) -> str:
    """NCCL between GPUs, gloo between CPU processes."""
    return "nccl" if device_type == "cuda" else "gloo"


def launched_rank(env: Mapping[str, str]) -> Optional[int]:
    """This process's rank if ``torchrun`` started it, else None."""
    return int(env["RANK"]) if "RANK" in env and "WORLD_SIZE" in env else None


def init_distributed(run_cfg) -> None:
    """Join the process group ``torchrun`` describes, and set ``distributed``, ``rank``, ``gpu`` and ``world_size``.

    Without ``torchrun`` this is a single process, whatever ``run.distributed`` says, as in LAVIS.
    """
    rank = launched_rank(os.environ)
    run_cfg.distributed = rank is not None
    if rank is None:
        return
    run_cfg.rank = rank
    run_cfg.world_size = int(os.environ["WORLD_SIZE"])
    run_cfg.gpu = int(os.environ.get("LOCAL_RANK", 0))
    device_type = torch.device(run_cfg.device).type
    if device_type == "cuda":
        torch.cuda.set_device(run_cfg.gpu)
    if not dist.is_initialized():
        dist.init_process_group(
            backend_for(device_type),
            init_method=run_cfg.get("dist_url", "env://"),
            rank=rank,
            world_size=run_cfg.world_size,
            timeout=datetime.timedelta(minutes=float(run_cfg.get("dist_timeout", None) or DEFAULT_TIMEOUT)),
        )


@contextlib.contextmanager
def leaves_group() -> Iterator[None]:
    """Leave the process group when the block ends well, as NCCL wants to be left.

    After an error or a signal the process is to end as it is: leaving could wait for ranks that wait for this one. How
    a process ends for good: `lavis_kvmod.system.ending`.
    """
    yield
    if is_dist_avail_and_initialized():
        dist.destroy_process_group()


def from_main(value: Any) -> Any:
    """Rank 0's ``value``, on every rank."""
    if not is_dist_avail_and_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(function: Callable[[], Any]) -> Any:
    """What ``function`` gives on rank 0, on every rank. If it fails there, all ranks raise what it raised, so that none
    waits for ever."""
    outcome = None
    if get_rank() == 0:
        try:
            outcome = (function(), None)
        except Exception as error:
            if not is_dist_avail_and_initialized():
                raise
            outcome = (None, error)
    value, error = from_main(outcome)
    if error is not None:
        raise error
    return value


def all_reduce_sum(values: Sequence[float], device: torch.device) -> List[float]:
    """Each value's sum over all ranks."""
    if not is_dist_avail_and_initialized():
        return [float(value) for value in values]
    tensor = torch.tensor([float(value) for value in values], dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def gather(rows: List[Any]) -> List[Any]:
    """The rows of all ranks, in rank order, on every rank."""
    if not is_dist_avail_and_initialized():
        return rows
    parts: List[Any] = [None] * get_world_size()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


__all__ = [
    "DEFAULT_TIMEOUT",
    "all_reduce_sum",
    "backend_for",
    "from_main",
    "gather",
    "get_rank",
    "get_world_size",
    "init_distributed",
    "launched_rank",
    "leaves_group",
    "on_main",
]
