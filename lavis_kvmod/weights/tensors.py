"""Weight files read and written one tensor at a time.

A file is mapped, not read: what a process then holds are the pages it has looked at. `TensorFiles` lets them go by
closing and mapping again, so that all that is ever held is about one tensor, the largest.
"""

import contextlib
import io
import json
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Callable, Dict, Hashable, List, Mapping, Optional, Tuple

import torch
from torch import Tensor

from lavis_kvmod.weights import files

# Files of small tensors only are not mapped anew for each of them.
SMALLEST_WINDOW = 8 * 2**20

# What the two formats call a dtype.
_DTYPES = {
    torch.float64: ("F64", torch.DoubleStorage),
    torch.float32: ("F32", torch.FloatStorage),
    torch.float16: ("F16", torch.HalfStorage),
    torch.bfloat16: ("BF16", torch.BFloat16Storage),
    torch.int64: ("I64", torch.LongStorage),
    torch.int32: ("I32", torch.IntStorage),
    torch.int16: ("I16", torch.ShortStorage),
    torch.int8: ("I8", torch.CharStorage),
    torch.uint8: ("U8", torch.ByteStorage),
    torch.bool: ("BOOL", torch.BoolStorage),
}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when it is wanted.

    Attributes:
        dtype, shape: what it will be.
        read: gives it; the caller lets go of it before it reads the next.
        data: tensors with the same are the same numbers (tied weights); None is like no other.
    """

    dtype: torch.dtype
    shape: Tuple[int, ...]
    read: Callable[[], Tensor]
    data: Optional[Hashable] = None

    @classmethod
    def of(cls, tensor: Tensor) -> "LazyTensor":
        """One that is in memory already."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> "LazyTensor":
        """Rows ``start`` to ``stop`` of it."""
        data = None if self.data is None else (self.data, start, stop)
        return LazyTensor(self.dtype, (stop - start, *self.shape[1:]), lambda: self.read()[start:stop], data)


class TensorFiles:
    """Weight files, open as long as needed, with no more mapped at once than about the largest tensor; ``metadata`` is
    what each holds beside its tensors."""

    def __init__(self) -> None:
        self.metadata: Dict[Path, Dict[str, Any]] = {}
        self._open: Dict[Path, files.StateDict] = {}
        self._mapped = 0
        self._window = SMALLEST_WINDOW

    def add(self, path: Path) -> Dict[str, LazyTensor]:
        """The tensors of one file, under the names they have there.

        Raises:
            FileNotFoundError, CheckpointError: see `lavis_kvmod.weights.files.read`.
        """
        tensors: Dict[str, LazyTensor] = {}
        names_at: Dict[Hashable, str] = {}
        for name, tensor in self._state(path).items():
            if tensor.dtype not in _DTYPES:
                known = ", ".join(str(dtype) for dtype in _DTYPES)
                raise files.CheckpointError(f"{path}: {name} is {tensor.dtype}; expected one of {known}")
            # Names that share a tensor in a .pth file are views of one place of the mapped file.
            place = (tensor.data_ptr() or name, tuple(tensor.shape), tensor.stride())
            first = names_at.setdefault(place, name)
            tensors[name] = LazyTensor(
                tensor.dtype,
                tuple(tensor.shape),
                partial(self._read, path, name, tensor.nbytes),
                data=(path, first),
            )
            self._window = max(self._window, tensor.nbytes)
        return tensors

    def add_folder(self, folder: Path) -> Dict[str, LazyTensor]:
        """The tensors of a Hugging Face folder; raises as `add`, also if a shard or a tensor of its is missing."""
        tensors: Dict[str, LazyTensor] = {}
        for file in files.weight_files(folder):
            tensors.update(self.add(file))
        lacking = sorted(set(files.weight_map(folder)) - set(tensors))
        if lacking:
            raise files.CheckpointError(
                f"{folder}: its files lack what its index names, so one is not whole or not of this folder:\n"
                + files.listing("missing", lacking)
            )
        return tensors

    def _state(self, path: Path) -> files.StateDict:
        if path not in self._open:
            contents = files.read(path, mmap=True)
            self._open[path] = files.model_tensors(contents, path)
            self.metadata[path] = files.metadata(contents, path)
        return self._open[path]

    def _read(self, path: Path, name: str, size: int) -> Tensor:
        if self._mapped + size > self._window:
            # Files of PyTorch before 1.6 cannot be mapped: they are in memory, and reading them again would not help.
            self._open = {file: state for file, state in self._open.items() if not files.can_be_mapped(file)}
            self._mapped = 0
        self._mapped += size
        return self._state(path)[name]


def read_all(tensors: Mapping[str, LazyTensor], dtype: Optional[torch.dtype] = None) -> files.StateDict:
    """All of them as tensors of their own, no views of a file, in ``dtype`` or as they are; what is tied stays one."""
    read: Dict[Hashable, Tensor] = {}
    state = {}
    for name, tensor in tensors.items():
        place = tensor.data or name
        if place not in read:
            read[place] = tensor.read().to(dtype or tensor.dtype, copy=True)
        state[name] = read[place]
    return state


# ---------------------------------------------------------------- writing

Written = Callable[[int], Any]  # called with the number of bytes just written


def write_safetensors(
    path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str], written: Written
) -> None:
    """Write one safetensors file tensor by tensor.

    The library's own ``save_file`` wants all of them at once: of a mapped file of 192 MiB, whose largest tensor has 64,
    it holds 192 (measured with safetensors 0.8; older ones copy each into bytes besides), this 64.

    The format: the header's length in 8 bytes, the header (JSON, padded to a multiple of 8), the tensors. Of names
    for the same numbers, the first is written.
    """
    once = {tensor.data or name: name for name, tensor in reversed(list(tensors.items()))}
    # Widest dtype first, as the library does: every tensor then starts at a multiple of its item's size.
    names = sorted(once.values(), key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: Dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype][0],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    packed = json.dumps(header, separators=(",", ":")).encode()
    packed += b" " * (-len(packed) % 8)
    with open(path, "wb") as file:
        file.write(len(packed).to_bytes(8, "little"))
        file.write(packed)
        for name in names:
            numbers = tensors[name].read().contiguous()
            file.write(numbers.reshape(-1).view(torch.uint8).numpy().data)
            written(numbers.nbytes)
            del numbers


class _Storage:
    """Stands for a tensor's numbers while the ``.pth`` file's table is pickled."""

    def __init__(self, key: str, tensor: LazyTensor):
        self.key, self.tensor = key, tensor


class _Table(pickle.Pickler):
    """Pickles LazyTensors as ``torch.save`` pickles tensors, without their numbers."""

    def __init__(self, file: IO[bytes]):
        super().__init__(file, protocol=2)
        self.records: Dict[Hashable, _Storage] = {}

    def persistent_id(self, obj: Any) -> Optional[Tuple[Any, ...]]:
        if not isinstance(obj, _Storage):
            return None
        numel = torch.Size(obj.tensor.shape).numel()
        return ("storage", _DTYPES[obj.tensor.dtype][1], obj.key, "cpu", numel)

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, LazyTensor):
            return NotImplemented
        storage = self.records.setdefault(obj.data or id(obj), _Storage(str(len(self.records)), obj))
        strides = torch.empty(obj.shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (storage, 0, obj.shape, strides, False, OrderedDict())


def write_pth(path: Path, contents: Mapping[str, Any], written: Written) -> None:
    """Write what ``torch.save(contents)`` would, LazyTensors for tensors, one after the other.

    This uses the writer that ``torch.save`` writes with, and its layout: a table (``data.pkl``) and one record for each
    tensor. The writer is not public, but nothing public keeps the memory at one tensor: ``torch.save`` wants all at
    once (192 MiB of a mapped file of 192 MiB, whose largest tensor has 64; this 64), and
    ``torch.serialization.skip_data`` with the numbers filled in afterwards is a prototype, came with PyTorch 2.6, and
    leaves checksums that are wrong.
    """
    packed = io.BytesIO()
    table = _Table(packed)
    table.dump(contents)
    with open(path, "wb") as file:  # given a path, the writer would put its name into the file
        writer = torch._C.PyTorchFileWriter(file)
        try:
            writer.write_record("data.pkl", packed.getvalue(), len(packed.getvalue()))
            writer.write_record("byteorder", b"little", len(b"little"))
            for storage in table.records.values():
                tensor = storage.tensor.read().contiguous()
                start = tensor.storage_offset() * tensor.itemsize  # a row of a larger one starts further on
                numbers = tensor.untyped_storage()[start : start + tensor.nbytes]
                writer.write_record(f"data/{storage.key}", numbers, tensor.nbytes)
                written(tensor.nbytes)
                del tensor, numbers
            writer.write_end_of_file()
        except BaseException:
            # The writer would write its end when it is collected, into a closed file, and abort the process.
            with contextlib.suppress(RuntimeError, OSError):
                writer.write_end_of_file()
            raise


def write_shards(folder: Path, tensors: Mapping[str, LazyTensor], shard_bytes: int, written: Written) -> None:
    """Write ``model.safetensors``, or shards of at most ``shard_bytes`` (or one tensor) and their index."""
    shards = _shards(tensors, shard_bytes)
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {name: file for file, shard in zip(files, shards) for name in shard},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    for file, shard in zip(files, shards):
        # transformers reads only files that say so
        write_safetensors(folder / file, {name: tensors[name] for name in shard}, {"format": "pt"}, written)


def _shards(tensors: Mapping[str, LazyTensor], shard_bytes: int) -> List[List[str]]:
    shards: List[List[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards
