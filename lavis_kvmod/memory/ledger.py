"""What is allocated when: a ledger of every tensor's memory while a model runs, on real or on fake tensors."""

import weakref
from contextlib import contextmanager
from typing import Any, Collection, Dict, Iterable, Iterator, List, MutableMapping, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ELSEWHERE = "elsewhere"


class _Entry(NamedTuple):
    storage: int
    bytes: int  # negative when it is freed
    part: str


class Ledger(TorchDispatchMode):
    """Writes down every storage that operators allocate on a device, and when it is freed.

    As a context manager. Memory counts once, however many views there are of it, and as long as anything holds it:
    what a caching allocator would have to have at hand, without its rounding, its fragmentation and the libraries'
    own workspaces. Storages that were there before are not counted.

    Args:
        device_type: only what lies on ``cuda`` or ``cpu`` counts.
    """

    def __init__(self, device_type: str):
        super().__init__()
        self._device_type = device_type
        self._entries: List[_Entry] = []
        self._seen: MutableMapping[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()  # storage -> its number
        self._parts = [ELSEWHERE]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not torch.ops.prim.device.default:
            for value in tree_iter(out):
                if isinstance(value, Tensor) and value.device.type == self._device_type:
                    self._note(value.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        number, size = len(self._entries), storage.nbytes()
        self._seen[storage] = number
        self._entries.append(_Entry(number, size, self._parts[-1]))
        weakref.finalize(storage, self._entries.append, _Entry(number, -size, self._parts[-1])).atexit = False

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leave these out: they were there before."""
        for tensor in tensors:
            self._seen[tensor.untyped_storage()] = -1

    def number(self, tensor: Tensor) -> int:
        """Which storage a tensor lies in, for ``besides``; -1 for one that is not in the ledger."""
        return self._seen.get(tensor.untyped_storage(), -1)

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Book what is allocated inside under ``part``."""
        self.enter(part)
        try:
            yield
        finally:
            self.leave()

    def enter(self, part: str) -> None:
        """As `of`, up to `leave`."""
        self._parts.append(part)

    def leave(self) -> None:
        """Book under what was there before."""
        self._parts.pop()

    def live(self) -> Dict[str, int]:
        """Bytes that are allocated at this moment, by part."""
        totals: Dict[str, int] = {}
        for entry in self._entries:
            totals[entry.part] = totals.get(entry.part, 0) + entry.bytes
        return {part: size for part, size in totals.items() if size}

    def peak(self, besides: Collection[int] = ()) -> int:
        """The most bytes that were allocated at once, ``besides`` some storages."""
        size = most = 0
        for entry in self._entries:
            if entry.storage not in besides:
                size += entry.bytes
                most = max(most, size)
        return most
