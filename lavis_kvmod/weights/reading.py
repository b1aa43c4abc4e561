"""A model's weights, read under LAVIS's names and loaded with every key accounted for."""

from pathlib import Path
from typing import Iterable, NamedTuple, Optional

import torch
from torch import nn

from lavis_kvmod.weights.files import CheckpointError, PathLike, StateDict, can_be_mapped, listing, model_tensors, read
from lavis_kvmod.weights.hf_folders import open_lavis
from lavis_kvmod.weights.tensors import TensorFiles, read_all


class LoadReport(NamedTuple):
    """What ``load_state_dict`` reports; ``unexpected_keys`` is always empty, since those are an error."""

    missing_keys: list
    unexpected_keys: list


def read_weights(path: PathLike) -> StateDict:
    """The model's tensors of a checkpoint, under LAVIS's names: a state dict, bare or wrapped (see `model_tensors`),
    under LAVIS's names or Hugging Face's; or a Hugging Face folder of a BLIP-2 OPT. Raises as `open_lavis`."""
    tensors, _ = open_lavis(TensorFiles(), Path(path))
    return read_all(tensors)


def holds(path: PathLike, beginning: str) -> Optional[bool]:
    """Whether a checkpoint has tensors whose names begin so, under LAVIS's names; their numbers are not read.

    None where only reading all of it would tell, or it cannot be read.
    """
    path = Path(path)
    if path.is_file() and not can_be_mapped(path):
        return None
    try:
        tensors, _ = open_lavis(TensorFiles(), path)
    except (CheckpointError, OSError):
        return None
    return any(name.startswith(beginning) for name in tensors)


def read_folder(folder: PathLike, dtype: torch.dtype) -> StateDict:
    """All tensors of a Hugging Face folder, in ``dtype``: safetensors or ``pytorch_model*.bin``, in shards or whole.

    Each tensor is converted and let go before the next is read.

    Raises:
        FileNotFoundError, CheckpointError: see `TensorFiles.add_folder`.
    """
    return read_all(TensorFiles().add_folder(Path(folder)), dtype)


def load_weights(
    module: nn.Module,
    state: StateDict,
    *,
    source: PathLike,
    may_lack: Iterable[str] = (),
    assign: bool = False,
) -> LoadReport:
    """Copy ``state`` into ``module``; every key must fit, and only keys in ``may_lack`` may be missing.

    With ``assign`` the module takes the tensors themselves, in its own dtypes: for modules made without memory
    (`lavis_kvmod.models.empty`). ``state`` is then used up.

    Raises:
        CheckpointError: listing the missing and unexpected keys and those of another shape. The module is then
            unchanged.
    """
    own = module.state_dict()
    # Weights that are one (OPT's input and output embeddings) are there under either name.
    given = {own[key].data_ptr() for key in own if key in state} - {0}
    missing = [key for key in own if key not in state and own[key].data_ptr() not in given]
    problems = []
    lacking = sorted(set(missing) - set(may_lack))
    if lacking:
        problems.append(listing("missing", lacking))
    unexpected = sorted(set(state) - set(own))
    if unexpected:
        problems.append(listing("unexpected", unexpected))
    reshaped = [
        f"{key} (expected {tuple(own[key].shape)}, got {tuple(state[key].shape)})"
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    if reshaped:
        problems.append(listing("of another shape", reshaped))
    if problems:
        raise CheckpointError(f"{source} does not fit the model:\n" + "\n".join(problems))
    if assign:
        for key in state:  # one by one, so that a tensor and its conversion are held together only once
            state[key] = state[key].to(own[key].dtype)
    module.load_state_dict(state, strict=False, assign=assign)
    return LoadReport(missing, [])


def load_auxiliary_weights(module: nn.Module, path: PathLike) -> None:
    """Load a classifier's weights into its backbone: wrappers are taken off (`model_tensors`), the head is left out.

    Of MoCo's two networks the trained one (``encoder_q.``) is taken, and its queue left out. The head is ``_fc``
    (efficientnet_pytorch), ``classifier`` or ``fc`` (timm, MoCo).

    Raises:
        FileNotFoundError, CheckpointError: as `read`; all but the head must fit exactly.
    """
    state = model_tensors(read(path), path)
    if any(name.startswith("encoder_q.") for name in state):
        state = {name[len("encoder_q.") :]: value for name, value in state.items() if name.startswith("encoder_q.")}
    own = module.state_dict()
    head = [name for name in state if name not in own and name.split(".")[0] in ("_fc", "classifier", "fc", "head")]
    for name in head:
        del state[name]
    # Older files were written before BatchNorm counted its batches; the count is not used in eval mode.
    uncounted = [name for name in own if name.endswith("num_batches_tracked")]
    load_weights(module, state, source=path, may_lack=uncounted)
