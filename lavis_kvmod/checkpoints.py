"""Load, check and save weights: the only place that opens a weight file.

Loading never runs code from a file (``weights_only`` and safetensors), never ignores a key in silence, and saving
never leaves a half-written file where a good one was.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Union
from zipfile import BadZipFile, ZipFile, is_zipfile

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


def read(path: PathLike, mmap: bool = False) -> Any:
    """Read a ``.pth`` or ``.safetensors`` file on the CPU, without running code from it.

    With ``mmap`` the tensors are views of the file, read from the disk as they are looked at. The file must then not
    be written into while they live. (Those of a ``.safetensors`` file always are.)

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is truncated, a folder, not a checkpoint, or carries code.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; expected a .pth or .safetensors file")
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
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and can_be_mapped(path))
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise CheckpointError(_unreadable(path, error)) from error
        raise CheckpointError(
            f"{path} carries code besides tensors ({code[1]}), so it was not opened; save it again with tensors and "
            "plain Python values only"
        ) from error
    except (OSError, MemoryError):  # the machine's fault, not the file's
        raise
    except Exception as error:  # what a damaged pickle raises is anything
        raise CheckpointError(_unreadable(path, error)) from error


def can_be_mapped(path: PathLike) -> bool:
    """Whether `read` can map this file; PyTorch's format before 1.6 can only be read as a whole."""
    return Path(path).suffix == ".safetensors" or is_zipfile(path)


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
    """The model's tensors of a checkpoint, under LAVIS's names: a state dict, the one under ``model``, as LAVIS writes
    it, or either under Hugging Face's names; or a Hugging Face folder of a BLIP-2 OPT.

    Raises:
        FileNotFoundError, CheckpointError: see `read`; also if there are no tensors in it, or tensors that LAVIS's
            BLIP-2 OPT does not have under Hugging Face's names.
    """
    from lavis_kvmod.conversion import folders, names
    from lavis_kvmod.conversion.tensors import LazyTensor

    if Path(path).is_dir():
        return folders.read_weights(Path(path))
    state = model_tensors(read(path), path)
    if names.are_hf(state):
        lazy = names.to_lavis({name: LazyTensor.of(tensor) for name, tensor in state.items()}, path)
        state = {name: tensor.read() for name, tensor in lazy.items()}
    return state


def metadata(contents: Dict[str, Any], path: PathLike) -> Dict[str, Any]:
    """What a checkpoint that `read` gave holds beside its tensors: plain values, or a ``.safetensors`` file's texts."""
    if Path(path).suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}
    plain = (str, int, float, bool)
    return {key: value for key, value in contents.items() if isinstance(value, plain)}


def model_tensors(contents: Any, path: PathLike) -> StateDict:
    """The tensors among what `read` gave, under ``model`` if there is such an entry; ``path`` is for messages.

    Raises:
        CheckpointError: if there are none.
    """
    if isinstance(contents, dict) and isinstance(contents.get("model"), dict):
        contents = contents["model"]
    return _tensors_only(contents, path)


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
    shards = sorted(set(weight_map(folder).values()))
    if shards:
        return [folder / shard for shard in shards]
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
    raise FileNotFoundError(
        f"no weights in {folder}: expected model.safetensors or pytorch_model.bin, or the index of their shards"
    )


def weight_map(folder: Path) -> Dict[str, str]:
    """Which shard of a Hugging Face folder holds which tensor; empty if there are no shards.

    Raises:
        CheckpointError: if the index is not one.
    """
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (folder / stem).is_file():
            return {}
        index = folder / f"{stem}.index.json"
        if not index.is_file():
            continue
        try:
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            if shards and all(Path(shard).name == shard for shard in shards.values()):
                return shards
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        raise CheckpointError(f'{index}: expected {{"weight_map": {{tensor: file of this folder}}}}')
    return {}


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


def listing(what: str, keys: list) -> str:
    """One paragraph of an error message: how many, what about them, and the first of them by name."""
    shown = "".join(f"\n    {key}" for key in keys[:KEYS_SHOWN])
    rest = f"\n    … and {len(keys) - KEYS_SHOWN} more" if len(keys) > KEYS_SHOWN else ""
    return f"  {len(keys)} {what}:{shown}{rest}"


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
    state = _tensors_only(state, path)
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


def trained_state_dict(module: nn.Module) -> StateDict:
    """What a finetuned checkpoint holds: the trained parameters, no frozen weight and no buffer."""
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    return {name: value for name, value in module.state_dict().items() if name in trained}


def check_sha256(path: PathLike, expected: str) -> None:
    """Compare a file with its SHA-256.

    Raises:
        CheckpointError: if they differ.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: sha256 is that of one file, but this is a folder; leave out #sha256=…")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(2**20), b""):
            digest.update(block)
    if digest.hexdigest() != expected.lower():
        raise CheckpointError(
            f"{path} is not the file that was meant: expected sha256 {expected.lower()}, got {digest.hexdigest()}; "
            "delete it and fetch it again, or correct the sum"
        )


def save(obj: Any, path: PathLike) -> None:
    """Write ``obj`` with ``torch.save`` so that ``path`` is either the old file or the whole new one."""
    # A file, since torch.save writes a path's name into what it saves.
    with whole_or_nothing(path) as temporary, open(temporary, "wb") as file:
        torch.save(obj, file)


@contextmanager
def whole_or_nothing(path: PathLike) -> Iterator[Path]:
    """Gives another path to write a file or a folder under; it is put at ``path`` when all of it is on the disk.

    After a failure, or an interrupt, nothing is left and ``path`` is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        for written in [*temporary.glob("*"), temporary]:
            sync(written)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        if temporary.is_dir():  # only after a failure, as is the next
            shutil.rmtree(temporary)
        elif temporary.exists():
            temporary.unlink()


def sync(path: Path) -> None:
    """See that a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    opened = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
