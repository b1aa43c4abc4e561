"""Load, check and save weights: the only place that opens a weight file.

Loading never runs code from a file (``weights_only`` and safetensors), never ignores a key in silence, and saving
never leaves a half-written file where a good one was.
"""

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Union
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor, nn

StateDict = Dict[str, Tensor]
PathLike = Union[str, Path]

# Keys an error message spells out before it only counts the rest.
KEYS_SHOWN = 12


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or whose keys do not fit."""


class LoadReport(NamedTuple):
    """What ``load_state_dict`` reports; ``unexpected_keys`` is always empty, since those are an error."""

    missing_keys: list
    unexpected_keys: list


def read(path: PathLike) -> Any:
    """Read a ``.pth`` or ``.safetensors`` file on the CPU, without running code from it.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is truncated, not a checkpoint, or carries code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(str(path))
        except SafetensorError as error:
            raise CheckpointError(f"{path} is not a readable safetensors file ({error})") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise CheckpointError(_unreadable(path, error)) from error
        raise CheckpointError(
            f"{path} carries code besides tensors ({code[1]}), so it was not opened; save it again with tensors and "
            "plain Python values only"
        ) from error
    except (RuntimeError, EOFError, BadZipFile, KeyError, ValueError) as error:
        raise CheckpointError(_unreadable(path, error)) from error


def quick_problem(path: PathLike) -> Optional[str]:
    """What would keep `read` from reading ``path``, found without reading its tensors; None if nothing is seen."""
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors import SafetensorError, safe_open

            try:
                safe_open(str(path), framework="pt")
            except SafetensorError as error:
                return _unreadable(path, error)
            return None
        with open(path, "rb") as file:
            start = file.read(2)
        if start == b"\x80\x02":  # PyTorch's format before 1.6: only reading all of it tells more
            return None
        with ZipFile(path):  # the table of contents stands at the end, so a truncated file has none
            return None
    except PermissionError as error:
        return f"{path} cannot be read ({error.strerror})"
    except (BadZipFile, OSError) as error:
        return _unreadable(path, error)


def _unreadable(path: Path, error: Exception) -> str:
    size = path.stat().st_size
    return (
        f"{path} ({size:,} bytes) is not a readable checkpoint: truncated, or of another kind "
        f"({_first_line(error)}); expected .pth or .safetensors"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


def read_weights(path: PathLike) -> StateDict:
    """The model's tensors of a checkpoint: a state dict, or the one under ``model``, as LAVIS writes it.

    Raises:
        FileNotFoundError, CheckpointError: see `read`; also if there are no tensors in it.
    """
    state = read(path)
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    return _tensors_only(state, path)


def _tensors_only(state: Any, path: PathLike) -> StateDict:
    if not isinstance(state, dict) or not any(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(
            f"{path}: expected a state dict (name -> tensor), bare or under 'model', got {type(state).__name__}"
        )
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def read_folder(folder: PathLike, dtype: torch.dtype) -> StateDict:
    """All tensors of a Hugging Face folder, in ``dtype``: safetensors or ``pytorch_model*.bin``, in shards or whole.

    Each file is converted and let go before the next is read.

    Raises:
        FileNotFoundError: if there are no weights, or a shard that the index names is missing.
        CheckpointError: see `read`.
    """
    state: StateDict = {}
    for file in weight_files(Path(folder)):
        part = _tensors_only(read(file), file)
        for name in list(part):
            state[name] = part.pop(name).to(dtype)
    return state


def weight_files(folder: Path) -> List[Path]:
    """The files of a Hugging Face folder that together hold its weights; raises as `read_folder`."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{stem}.index.json"
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            return [folder / shard for shard in shards]
        if (folder / stem).is_file():
            return [folder / stem]
    raise FileNotFoundError(
        f"no weights in {folder}: expected model.safetensors or pytorch_model.bin, or the index of their shards"
    )


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
    missing = [key for key in own if key not in state]
    problems = []
    lacking = sorted(set(missing) - set(may_lack))
    if lacking:
        problems.append(_listing("missing", lacking))
    unexpected = sorted(set(state) - set(own))
    if unexpected:
        problems.append(_listing("unexpected", unexpected))
    reshaped = [
        f"{key} (expected {tuple(own[key].shape)}, got {tuple(state[key].shape)})"
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    if reshaped:
        problems.append(_listing("of another shape", reshaped))
    if problems:
        raise CheckpointError(f"{source} does not fit the model:\n" + "\n".join(problems))
    if assign:
        for key in state:  # one by one, so that a tensor and its conversion are held together only once
            state[key] = state[key].to(own[key].dtype)
    module.load_state_dict(state, strict=False, assign=assign)
    return LoadReport(missing, [])


def _listing(what: str, keys: list) -> str:
    shown = "".join(f"\n    {key}" for key in keys[:KEYS_SHOWN])
    rest = f"\n    … and {len(keys) - KEYS_SHOWN} more" if len(keys) > KEYS_SHOWN else ""
    return f"  {len(keys)} {what}:{shown}{rest}"


def load_auxiliary_weights(module: nn.Module, path: PathLike) -> None:
    """Load a classifier's weights into its backbone: wrappers are taken off, the classifier head is left out.

    Wrappers are a ``state_dict`` or ``model`` entry around the tensors and ``module.`` in front of the names. The
    head is ``_fc`` (efficientnet_pytorch), ``classifier`` or ``fc`` (timm).

    Raises:
        FileNotFoundError, CheckpointError: as `read_weights`; all but the head must fit exactly.
    """
    state = read(path)
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    state = _tensors_only(state, path)
    if all(name.startswith("module.") for name in state):
        state = {name[len("module.") :]: value for name, value in state.items()}
    own = module.state_dict()
    head = [name for name in state if name not in own and name.split(".")[0] in ("_fc", "classifier", "fc", "head")]
    for name in head:
        del state[name]
    # Older files were written before BatchNorm counted its batches; the count is not used in eval mode.
    uncounted = [name for name in own if name.endswith("num_batches_tracked")]
    load_weights(module, state, source=path, may_lack=uncounted)


def trained_state_dict(module: nn.Module) -> StateDict:
    """What a finetuned checkpoint holds: the trained parameters, no frozen weight and no buffer."""
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    return {name: value for name, value in module.state_dict().items() if name in trained}


def save(obj: Any, path: PathLike) -> None:
    """Write ``obj`` with ``torch.save`` so that ``path`` is either the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(obj, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if temporary.exists():  # only after a failure
            temporary.unlink()
