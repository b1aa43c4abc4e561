"""``run.compile`` and ``run.cuda_graphs``: which parts of a model `torch.compile` makes faster, and where it cannot.

Compiled are the image encoder, the second encoder, the connector with its prefix, and OPT as it is trained behind; not
its decoding, whose lengths change with every token. Modules are compiled in place, so parameters keep their names.
CUDA graphs are `torch.compile`'s own (``mode="reduce-overhead"``), and decoding's
(`lavis_kvmod.models.language.recorded`).
"""

import contextlib
import logging
from typing import Any, ContextManager, List, NamedTuple, Optional

import torch
from torch import nn

from lavis_kvmod.models.language.recorded import Recordings

__all__ = ["Plan", "begin_step", "compile_parts", "eagerly", "plan"]

GRAPHS = "reduce-overhead"


class Plan(NamedTuple):
    """How to compile: ``mode`` is `torch.compile`'s, None for not at all; ``refused``, what cannot be had, and why."""

    mode: Optional[str] = None
    refused: Optional[str] = None


def plan(compile_: bool, cuda_graphs: Any, device_type: str, *, fsdp: bool = False) -> Plan:
    """What ``run.compile`` and ``run.cuda_graphs`` come to on this device.

    ``cuda_graphs: auto`` records graphs wherever it can, and is silent elsewhere; ``true`` says why not.
    """
    why_not = _no_graphs(device_type, fsdp)
    if cuda_graphs and why_not is None:
        return Plan(GRAPHS)
    refused = f"run.cuda_graphs: {why_not}" if cuda_graphs is True else None
    if compile_ and fsdp:
        return Plan(None, "run.compile: OPT's layers are gathered as they are run (run.fsdp); not compiled")
    return Plan("default" if compile_ else None, refused)


def _no_graphs(device_type: str, fsdp: bool) -> Optional[str]:
    if device_type != "cuda":
        return f"graphs are recorded on a GPU, and run.device is {device_type}; without them"
    if fsdp:
        return "OPT's layers are gathered as they are run (run.fsdp), which no graph holds; without them"
    return None


def compile_parts(model: nn.Module, wanted: Plan, device: torch.device) -> List[str]:
    """Have parts of a model compiled when they are first run; whatever cannot be is run as it is.

    Returns:
        The names of the parts; none, with a line in the log, where nothing is to be compiled that was asked for.
    """
    if wanted.refused:
        logging.warning(wanted.refused)
    if wanted.mode is None:
        return []
    problem = _no_compiler(device)
    if problem is not None:
        logging.warning("run.compile: %s; the model is run as it is", problem)
        return []
    torch._dynamo.config.suppress_errors = True  # a part that cannot be compiled is told, and run as it is
    parts = {name: getattr(model, name, None) for name in ("visual_encoder", "Qformer", "kv_prefix")}
    aux_encoder = getattr(model, "aux_encoder", None)
    if device.type == "cuda":  # a CPU computes with a folded copy
        parts["aux_encoder"] = getattr(aux_encoder, "backbone", None)
    found = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    for part in found.values():
        part.compile(mode=wanted.mode)
    opt_model: Any = getattr(model, "opt_model", None)
    decoder: Any = getattr(getattr(opt_model, "model", None), "decoder", None)
    # Gated layers are hooks between OPT's, put there for each pass, which compiled code does not see.
    if hasattr(decoder, "compile_causal") and getattr(model, "gated_layers", None) is None:
        decoder.compile_causal(wanted.mode)
        found["opt_model"] = decoder
        if wanted.mode == GRAPHS:
            opt_model.recordings = Recordings()
    logging.info("compiled when first run, which takes minutes: %s (mode %s)", ", ".join(found), wanted.mode)
    return list(found)


def _no_compiler(device: torch.device) -> Optional[str]:
    """Why nothing can be compiled here: found out by a little function."""
    if not hasattr(nn.Module, "compile"):
        return f"PyTorch {torch.__version__} does not compile modules in place"
    try:
        torch.compile(_little)(torch.ones(8, device=device))
    except Exception as error:  # no C++ compiler, no Triton, an unknown Python: all tell it in their own way
        return f"torch.compile does not work here ({type(error).__name__}: {str(error).strip().splitlines()[0]})"
    return None


def _little(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1


def begin_step(wanted: Plan) -> None:
    """Before each forward pass: what recorded graphs have written before may now be written over."""
    if wanted.mode == GRAPHS:
        torch.compiler.cudagraph_mark_step_begin()


def eagerly() -> ContextManager[Any]:
    """Within, nothing is compiled: for what is run once, or counted."""
    if hasattr(torch.compiler, "set_stance"):
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()
