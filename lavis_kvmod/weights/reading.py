"""A model's weights, read under LAVIS's names and loaded with every key accounted for."""

from pathlib import Path
from typing import Iterable, NamedTuple

import torch
from torch import nn

from lavis_kvmod.weights import hf_folders, hf_names
from lavis_kvmod.weights.files import (
    CheckpointError,
    PathLike,
    StateDict,
    listing,
    model_tensors,
    read,
    tensors_only,
    weight_files,
)
from lavis_kvmod.weights.tensors import LazyTensor


class LoadReport(NamedTuple):
    """What ``load_state_dict`` reports; ``unexpected_keys`` is always empty, since those are an error."""

    missing_keys: list
    unexpected_keys: list


def read_weights(path: PathLike) -> StateDict:
    """The model's tensors of a checkpoint, under LAVIS's names: a state dict, the one under ``model``, as LAVIS writes
    it, or either under Hugging Face's names; or a Hugging Face folder of a BLIP-2 OPT.

    Raises:
        FileNotFoundError, CheckpointError: see `read`; also if there are no tensors in it, or tensors that LAVIS's
            BLIP-2 OPT does not have under Hugging Face's names.
    """
    if Path(path).is_dir():
        return hf_folders.read_weights(Path(path))
    state = model_tensors(read(path), path)
    if hf_names.are_hf(state):
        lazy = hf_names.to_lavis({name: LazyTensor.of(tensor) for name, tensor in state.items()}, path)
        state = {name: tensor.read() for name, tensor in lazy.items()}
    return state


def read_folder(folder: PathLike, dtype: torch.dtype) -> StateDict:
    """All tensors of a Hugging Face folder, in ``dtype``: safetensors or ``pytorch_model*.bin``, in shards or whole.

    Each file is converted and let go before the next is read.

    Raises:
        FileNotFoundError: if there are no weights, or a shard that the index names is missing.
        CheckpointError: see `read`.
    """
    state: StateDict = {}
    for file in weight_files(Path(folder)):
        part = tensors_only(read(file), file)
        for name in list(part):
            state[name] = part.pop(name).to(dtype)
    return state


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
    """Load a classifier's weights into its backbone: wrappers are taken off, the classifier head is left out.

    Wrappers are a ``state_dict`` or ``model`` entry around the tensors and ``module.`` in front of the names. Of
    MoCo's two networks the trained one (``encoder_q.``) is taken, and its queue left out. The head is ``_fc``
    (efficientnet_pytorch), ``classifier`` or ``fc`` (timm, MoCo).

    Raises:
        FileNotFoundError, CheckpointError: as `read_weights`; all but the head must fit exactly.
    """
    state = read(path)
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    state = tensors_only(state, path)
    if all(name.startswith("module.") for name in state):
        state = {name[len("module.") :]: value for name, value in state.items()}
    if any(name.startswith("encoder_q.") for name in state):
        state = {name[len("encoder_q.") :]: value for name, value in state.items() if name.startswith("encoder_q.")}
    own = module.state_dict()
    head = [name for name in state if name not in own and name.split(".")[0] in ("_fc", "classifier", "fc", "head")]
    for name in head:
        del state[name]
    # Older files were written before BatchNorm counted its batches; the count is not used in eval mode.
    uncounted = [name for name in own if name.endswith("num_batches_tracked")]
    load_weights(module, state, source=path, may_lack=uncounted)
