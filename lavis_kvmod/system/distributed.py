"""One process or many: every collective here is a no-op without a process group."""

import contextlib
import datetime
import os
import re
from typing import Any, Callable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from lavis.common.dist_utils import get_rank, get_world_size, is_dist_avail_and_initialized
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.nn.parallel import DistributedDataParallel

# Minutes after which a rank gives up waiting for the others: rank 0 may download weights meanwhile.
DEFAULT_TIMEOUT = 60


def backend_for(device_type: str) -> str:
    """NCCL between GPUs, gloo between CPU processes."""
    return "nccl" if device_type == "cuda" else "gloo"


def group_device(device_type: str, local_rank: int) -> Optional[torch.device]:
    """The GPU that NCCL is told: it would guess one, and say so, at the first barrier."""
    return torch.device("cuda", local_rank) if device_type == "cuda" else None


class Launch(NamedTuple):
    """What started this process tells it: its rank among how many, its rank on this machine, where they meet."""

    rank: int
    world_size: int
    local_rank: int
    address: Optional[str] = None  # None: torchrun has set it
    port: Optional[int] = None


def launched_rank(env: Mapping[str, str]) -> Optional[int]:
    """This process's rank if ``torchrun`` or ``srun`` started it as one of several, else None."""
    launch = launch_of(env)
    return None if launch is None else launch.rank


def launch_of(env: Mapping[str, str]) -> Optional[Launch]:
    """How this process was started: by ``torchrun``, as a task of SLURM's ``srun``, or alone (None).

    LAVIS reads ``SLURM_PROCID``, and wants number and meeting place of the processes in the run file
    (common/dist_utils.py:76); here SLURM's own variables tell them, unless ``MASTER_ADDR`` and ``MASTER_PORT`` do. A
    batch script has ``SLURM_PROCID`` as well; what it runs without ``srun`` is a single process.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        return Launch(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)))
    tasks = env.get("SLURM_STEP_NUM_TASKS") or (env.get("SLURM_NTASKS") if env.get("MASTER_ADDR") else None)
    if "SLURM_PROCID" not in env or tasks is None or int(tasks) < 2:
        return None
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    port = 20000 + (int(env.get("SLURM_JOB_ID", 0)) + int(env.get("SLURM_STEP_ID", 0))) % 20000
    return Launch(
        int(env["SLURM_PROCID"]),
        int(tasks),
        int(env.get("SLURM_LOCALID", 0)),
        env.get("MASTER_ADDR") or _first_node(nodes),
        int(env.get("MASTER_PORT") or port),
    )


def _first_node(nodes: str) -> str:
    """The first of SLURM's list of nodes: of ``gpu[07-09,12],cpu1`` it is ``gpu07``."""
    return re.sub(r"\[(\w+).*", r"\1", nodes.split(",")[0])


def init_distributed(run_cfg: Any) -> None:
    """Join the process group that ``torchrun`` or ``srun`` describes, and set ``distributed``, ``rank``, ``gpu`` and
    ``world_size``.

    Without either this is a single process, whatever ``run.distributed`` says, as in LAVIS.
    """
    launch = launch_of(os.environ)
    run_cfg.distributed = launch is not None
    if launch is None:
        return
    if launch.address is not None:  # the names that PyTorch reads
        os.environ.update(RANK=str(launch.rank), WORLD_SIZE=str(launch.world_size), LOCAL_RANK=str(launch.local_rank))
        os.environ.update(MASTER_ADDR=launch.address, MASTER_PORT=str(launch.port))
    run_cfg.rank = launch.rank
    run_cfg.world_size = launch.world_size
    device_type = torch.device(run_cfg.device).type
    # srun may show each task its own GPU alone, which then is the first
    gpus = torch.cuda.device_count() if device_type == "cuda" else 0
    run_cfg.gpu = launch.local_rank % gpus if gpus else launch.local_rank
    if device_type == "cuda":
        torch.cuda.set_device(run_cfg.gpu)
    if not dist.is_initialized():
        dist.init_process_group(
            backend_for(device_type),
            init_method=run_cfg.get("dist_url", "env://"),
            rank=launch.rank,
            world_size=launch.world_size,
            device_id=group_device(device_type, run_cfg.gpu),
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


def data_parallel(model: nn.Module, gpu: Optional[int]) -> DistributedDataParallel:
    """``model`` with its trained parameters made rank 0's, and their gradients averaged over all ranks.

    What is frozen is left alone, buffers too: all ranks have it from the same files.

    Args:
        model: on its device.
        gpu: its number; None on the CPU.
    """
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    buffers = [name for name, _ in model.named_buffers()]
    # DDP has no public way to leave parameters alone; this is what its own tests use.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*frozen, *buffers])
    return DistributedDataParallel(
        model, device_ids=None if gpu is None else [gpu], broadcast_buffers=False, gradient_as_bucket_view=True
    )


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
    outcome: Tuple[Any, Optional[Exception]] = (None, None)
    if get_rank() == 0:
        try:
            outcome = (function(), None)
        except Exception as error:
            if not is_dist_avail_and_initialized():
                raise
            outcome = (None, error)
    value, failed = from_main(outcome)
    if failed is not None:
        raise failed
    return value


def all_reduce_sum(values: Sequence[float], device: torch.device) -> List[float]:
    """Each value's sum over all ranks, as numbers."""
    return all_reduce_tensor(torch.tensor([float(v) for v in values], dtype=torch.float64, device=device)).tolist()


def all_reduce_tensor(values: Tensor) -> Tensor:
    """The sum over all ranks, on the device; without gradients."""
    values = values.detach().clone()
    if is_dist_avail_and_initialized():
        dist.all_reduce(values)
    return values


def gather_rows(rows: Tensor) -> Tensor:
    """(b, …) of each rank -> (B, …) of all, in rank order; gradients find their way back to the rank they belong to.

    ``b`` may differ from rank to rank.
    """
    if not is_dist_avail_and_initialized():
        return rows
    sizes = [int(size) for size in gather([len(rows)])]
    longest = max(sizes)
    padded = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
    if rows.requires_grad:
        parts = all_gather(padded)
    else:
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded.contiguous())
    return torch.cat([part[:size] for part, size in zip(parts, sizes)])


def gather(rows: List[Any]) -> List[Any]:
    """The rows of all ranks, in rank order, on every rank."""
    if not is_dist_avail_and_initialized():
        return rows
    parts: List[Any] = [None] * get_world_size()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


__all__ = [
    "DEFAULT_TIMEOUT",
    "Launch",
    "all_reduce_sum",
    "all_reduce_tensor",
    "backend_for",
    "data_parallel",
    "from_main",
    "gather",
    "gather_rows",
    "get_rank",
    "get_world_size",
    "group_device",
    "init_distributed",
    "launch_of",
    "launched_rank",
    "leaves_group",
    "on_main",
]
