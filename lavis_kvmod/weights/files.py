"""Weight files, opened and saved: the only place that does.

Loading never runs code from a file (``weights_only`` and safetensors), and saving never leaves a half-written file
where a good one was.
"""

import argparse
import hashlib
import json
import os
import pickle
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Union
from zipfile import BadZipFile, ZipFile, is_zipfile

import numpy as np
import torch
from torch import Tensor, nn

from lavis_kvmod.weights.kinds import other_kind

StateDict = Dict[str, Tensor]
PathLike = Union[str, Path]

# Keys an error message spells out before it only counts the rest.
KEYS_SHOWN = 12


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or whose keys do not fit."""


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
    other = other_kind(path)
    if other is not None:
        raise CheckpointError(_of_another_kind(path, other))
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(str(path))
        except SafetensorError as error:
            raise CheckpointError(f"{path} is not a readable safetensors file ({error})") from error
    try:
        with _plain_values_allowed():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and can_be_mapped(path))
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:  # PyTorch's own words advise to run what the file says
            raise CheckpointError(_unreadable(path)) from error
        raise CheckpointError(
            f"{path} carries code besides tensors ({code[1]}), so it was not opened; save it again with tensors and "
            "plain Python values only"
        ) from error
    except (OSError, MemoryError):  # the machine's fault, not the file's
        raise
    except Exception as error:  # what a damaged pickle raises is anything
        raise CheckpointError(_unreadable(path, error)) from error


def _numpy_scalar(module: str) -> Callable[..., Any]:
    """What NumPy makes one number of, under the name that files have for it: ``module`` differs with its version."""
    make: Any = np.float64(0).__reduce__()[0]

    def scalar(*args: Any) -> Any:
        return make(*args)

    scalar.__module__, scalar.__qualname__ = module, "scalar"
    return scalar


# What training scripts (timm's is one) save beside the tensors: their arguments, and numbers of NumPy. Making these
# runs no code of the file's.
_PLAIN_VALUES: List[Any] = [
    argparse.Namespace,
    np.dtype,
    *{type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?"},
    *(_numpy_scalar(f"numpy.{core}.multiarray") for core in ("core", "_core")),
]


@contextmanager
def _plain_values_allowed() -> Iterator[None]:
    """``torch.serialization.safe_globals``, which PyTorch 2.4 does not have yet."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals(_PLAIN_VALUES)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def can_be_mapped(path: PathLike) -> bool:
    """Whether `read` can map this file; PyTorch's format before 1.6 can only be read as a whole."""
    return Path(path).suffix == ".safetensors" or is_zipfile(path)


def quick_problem(path: PathLike) -> Optional[str]:
    """What would keep `read` from reading ``path``, found without reading its tensors; None if nothing is seen."""
    path = Path(path)
    try:
        other = other_kind(path)
        if other is not None:
            return _of_another_kind(path, other)
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


def _of_another_kind(path: Path, kind: str) -> str:
    return f"{path} ({path.stat().st_size:,} bytes) is not a readable checkpoint: it is {kind}"


def _unreadable(path: Path, error: Optional[Exception] = None) -> str:
    reason = "" if error is None else f" ({_first_line(error)})"
    return (
        f"{path} ({path.stat().st_size:,} bytes) is not a readable checkpoint: truncated, or of another kind{reason}; "
        "expected .pth or .safetensors"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


def metadata(contents: Dict[str, Any], path: PathLike) -> Dict[str, Any]:
    """What a checkpoint that `read` gave holds beside its tensors: plain values, or a ``.safetensors`` file's texts."""
    if Path(path).suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}
    plain = (str, int, float, bool)
    return {key: value for key, value in contents.items() if isinstance(value, plain)}


# Around the tensors of a checkpoint: LAVIS's, timm's and MoCo's, and what many training scripts write.
_WRAPPERS = ("model", "state_dict", "model_state_dict")


def model_tensors(contents: Any, path: PathLike) -> StateDict:
    """The tensors among what `read` gave, without what training scripts wrap them in: an entry ``model``,
    ``state_dict`` or ``model_state_dict`` around all, ``module.`` (`DataParallel`) in front of all names, and
    ``_orig_mod.`` (`torch.compile`) within any.

    Args:
        path: for messages.

    Raises:
        CheckpointError: if there are none.
    """
    while isinstance(contents, dict):
        inner = next((contents[key] for key in _WRAPPERS if isinstance(contents.get(key), dict)), None)
        if inner is None:
            break
        contents = inner
    if not isinstance(contents, dict) or not any(isinstance(value, Tensor) for value in contents.values()):
        raise CheckpointError(
            f"{path}: expected a state dict (name -> tensor), bare or under one of {', '.join(_WRAPPERS)}, "
            f"got {type(contents).__name__}"
        )
    state = {name.replace("_orig_mod.", ""): v for name, v in contents.items() if isinstance(v, Tensor)}
    while all(name.startswith("module.") for name in state):
        state = {name[len("module.") :]: value for name, value in state.items()}
    return state


def weight_files(folder: Path) -> List[Path]:
    """The files of a Hugging Face folder that together hold its weights.

    Raises:
        FileNotFoundError: if there are none.
        CheckpointError: see `weight_map`.
    """
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


def listing(what: str, keys: list) -> str:
    """One paragraph of an error message: how many, what about them, and the first of them by name."""
    shown = "".join(f"\n    {key}" for key in keys[:KEYS_SHOWN])
    rest = f"\n    … and {len(keys) - KEYS_SHOWN} more" if len(keys) > KEYS_SHOWN else ""
    return f"  {len(keys)} {what}:{shown}{rest}"


def trained_state_dict(module: nn.Module) -> StateDict:
    """What a finetuned checkpoint holds: the trained parameters, no frozen weight and no buffer; but what the model
    itself says belongs to its training (``kept_in_training``, beginnings of names)."""
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    kept = tuple(getattr(module, "kept_in_training", ()))
    return {name: value for name, value in module.state_dict().items() if name in trained or name.startswith(kept)}


def sha256(path: PathLike) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(2**20), b""):
            digest.update(block)
    return digest.hexdigest()


def check_sha256(path: PathLike, expected: str) -> None:
    """Compare a file with its SHA-256.

    Raises:
        CheckpointError: if they differ.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: sha256 is that of one file, but this is a folder; leave out #sha256=…")
    got = sha256(path)
    if got != expected.lower():
        raise CheckpointError(
            f"{path} is not the file that was meant: expected sha256 {expected.lower()}, got {got}; "
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
