"""A frozen language model that does not fit one GPU, spread over all of them: PyTorch's FSDP (``fully_shard``).

Each rank keeps 1/world of every OPT layer and gathers a layer's weights when it is run. All ranks must then run OPT
equally often: `is_sharded` is what generation and evaluation ask. Nothing that is trained is sharded, so gradients,
optimiser and checkpoints are as without.
"""

import os
from typing import List

import torch
import torch.distributed as dist
from torch import nn

from lavis_kvmod.system.distributed import launched_rank

_ALONE = "run.fsdp: needs several processes; start the run with torchrun --nproc_per_node=N"


def sharding_problems(run, starts: bool = True) -> List[str]:
    """What keeps ``run.fsdp`` from working.

    Args:
        run: the run section.
        starts: whether this process is to run it, so that the others must be there.
    """
    if not run.get("fsdp", False):
        return []
    problems = []
    if starts and launched_rank(os.environ) is None:
        problems.append(_ALONE)
    if not hasattr(torch.distributed, "fsdp") or not hasattr(torch.distributed.fsdp, "fully_shard"):
        problems.append(f"run.fsdp: needs fully_shard (PyTorch 2.6 or newer), this is {torch.__version__}")
    if run.get("inference_method") == "rank":
        problems.append(
            "run.fsdp: ranking answers runs the language model unequally often on the ranks; set run.inference_method: "
            "generate, or rank afterwards without fsdp"
        )
    return problems


def shard_language_model(model: nn.Module, device_type: str) -> List[str]:
    """Shard the layers of ``model.opt_model`` over the process group, in place; move them to the rank's device.

    Returns:
        Names of all of OPT's parameters: DistributedDataParallel is to leave them alone.

    Raises:
        ValueError: if the language model is trained, or there is no process group.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized():
        raise ValueError(_ALONE)
    if any(parameter.requires_grad for parameter in model.opt_model.parameters()):
        raise ValueError("run.fsdp: shards the frozen language model, this one is trained")
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    for layer in model.opt_model.model.decoder.layers:  # one by one: never two whole layers on a GPU
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    return [name for name, _ in model.named_parameters() if name.startswith("opt_model.")]


def is_sharded(opt: nn.Module) -> bool:
    """Whether `shard_language_model` was here."""
    return any(type(parameter).__name__ == "DTensor" for parameter in opt.model.decoder.layers.parameters())
