"""Annotations as one block of memory that all workers share.

A list of dicts is copied into every worker as it is read: Python counts references within the objects, and so writes to
each page it looks at. Here rows are bytes in one NumPy array, and a dict is made of one when it is asked for.
"""

import pickle
from array import array
from collections.abc import Sequence as SequenceABC
from typing import Any, Dict, Iterable, List, Mapping, NoReturn, Tuple, Union, overload

import numpy as np

__all__ = ["RowStore"]


class _Row(Dict[str, Any]):
    """A row that was taken out. Writing into it would change nothing in the store, so it is refused."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("a row is made when it is asked for: write annotation[i] = {**annotation[i], ...} to change it")

    __setitem__ = __delitem__ = pop = update = setdefault = clear = popitem = _refuse

    def __reduce__(self) -> Tuple[Any, ...]:
        return dict, (dict(self),)


class RowStore(SequenceABC):
    """Rows by position, as a list of dicts gives them, in one block of bytes.

    A row takes the bytes that its values take when pickled; the names of its keys are kept once for all rows.

    Args:
        rows: dicts with texts as keys, and whatever can be pickled as values.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]]):
        self._keys: List[Tuple[str, ...]] = []  # the few sets of keys that there are
        self._changed: Dict[int, bytes] = {}
        known: Dict[Tuple[str, ...], int] = {}
        content, ends = bytearray(), array("q", [0])
        for row in rows:
            keys = tuple(row)
            number = known.setdefault(keys, len(known))
            if number == len(self._keys):
                self._keys.append(keys)
            content += pickle.dumps((number, *row.values()), protocol=pickle.HIGHEST_PROTOCOL)
            ends.append(len(content))
        self._content = np.frombuffer(content, np.uint8)
        self._ends = np.frombuffer(ends, np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> List[Dict[str, Any]]: ...

    def __getitem__(self, index: Union[int, slice]) -> Union[Dict[str, Any], List[Dict[str, Any]]]:
        """The row there, or a list of those of a slice.

        Raises:
            IndexError: past the end.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = self._place(index)
        content: Any = self._changed.get(index)
        if content is None:
            content = self._content[self._ends[index] : self._ends[index + 1]].data
        number, *values = pickle.loads(content)
        return _Row(zip(self._keys[number], values))

    def __setitem__(self, index: int, row: Mapping[str, Any]) -> None:
        """Put another row there."""
        keys = tuple(row)
        if keys not in self._keys:
            self._keys.append(keys)
        place = self._place(index)
        self._changed[place] = pickle.dumps((self._keys.index(keys), *row.values()), pickle.HIGHEST_PROTOCOL)

    def _place(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"no row {index} among {len(self)}")
        return index % len(self)

    @property
    def nbytes(self) -> int:
        """The memory that the rows take."""
        return self._content.nbytes + self._ends.nbytes + sum(map(len, self._changed.values()))
