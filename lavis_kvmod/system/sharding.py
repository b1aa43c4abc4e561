"""A frozen language model that does not fit one GPU, spread over all of them: PyTorch's FSDP (``fully_shard``).

Each rank keeps 1/world of every OPT layer and gathers a layer's weights when it is run. All ranks must then run OPT
equally often: `is_sharded` is what generation and evaluation ask. Nothing that is trained is sharded, so gradients,
optimiser and checkpoints are as without.
"""

import inspect
import os
from typing import Any, List, Mapping, Set

import torch
import torch.distributed as dist
from torch import nn

from lavis_kvmod.system.distributed import launched_rank

_ALONE = "run.fsdp: needs several processes; start the run with torchrun --nproc_per_node=N"


def sharding_problems(run: Mapping[str, Any], starts: bool = True) -> List[str]:
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
    if not _can_leave_out():
        problems.append(
            f"run.fsdp: needs fully_shard with ignored_params (PyTorch 2.7 or newer), this is {torch.__version__}"
        )
    if run.get("inference_method") == "rank":
        problems.append(
            "run.fsdp: ranking answers runs the language model unequally often on the ranks; set run.inference_method: "
            "generate, or rank afterwards without fsdp"
        )
    return problems


def shard_language_model(model: Any, device_type: str) -> None:
    """Shard the layers of ``model.opt_model`` over the process group, in place; move them to the rank's device.

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
    decoder = model.opt_model.model.decoder
    for layer in decoder.layers:  # one by one: never more than two whole layers on a GPU
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    # One root over them, or each layer is one of its own: older versions never let go of what a root has gathered
    # (pytorch#154655), and none gathers a layer while the one before is run.
    fully_shard(decoder, mesh=mesh, ignored_params=_outside_layers(decoder))


def _outside_layers(decoder: Any) -> Set[nn.Parameter]:
    """The embeddings, which are used outside of the decoder too (as its head, and by whoever makes its input), and what
    is small."""
    in_layers = set(decoder.layers.parameters())
    return {parameter for parameter in decoder.parameters() if parameter not in in_layers}


def _can_leave_out() -> bool:
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        return False
    return "ignored_params" in inspect.signature(fully_shard).parameters


def is_sharded(opt: Any) -> bool:
    """Whether `shard_language_model` was here."""
    return any(type(parameter).__name__ == "DTensor" for parameter in opt.model.decoder.layers.parameters())
