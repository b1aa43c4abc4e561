"""Names that stand for parts: what there is, what users add, and what is told of a name that is not there."""

import difflib
from fnmatch import fnmatchcase
from typing import Callable, Dict, Generic, Iterator, List, Optional, TypeVar, Union, overload

Entry = TypeVar("Entry")
Members = Callable[[], List[str]]


class Registry(Generic[Entry]):
    """Parts of one kind by name, as a run file names them.

    A name that ends in a colon is that of a family: ``timm:`` stands for ``timm:NAME``, for every NAME that its
    ``members`` list.

    Args:
        kind: what is registered, in words, such as ``image encoder``.
        key: the key of the run file that takes such a name.
    """

    def __init__(self, kind: str, key: str):
        self.kind, self.key = kind, key
        self._entries: Dict[str, Entry] = {}
        self._members: Dict[str, Members] = {}

    @overload
    def register(self, name: str, entry: Entry, members: Optional[Members] = None) -> Entry: ...

    @overload
    def register(
        self, name: str, entry: None = None, members: Optional[Members] = None
    ) -> Callable[[Entry], Entry]: ...

    def register(
        self, name: str, entry: Optional[Entry] = None, members: Optional[Members] = None
    ) -> Union[Entry, Callable[[Entry], Entry]]:
        """Add a part, as a call or (without ``entry``) as a decorator.

        Raises:
            ValueError: if the name is taken, listing what there is, or is that of a family without ``members``.
        """
        if entry is None:
            return lambda decorated: self.register(name, decorated, members)
        if not isinstance(name, str) or not name:
            raise ValueError(f"{self.kind}: expected a name, got {name!r}")
        if name.endswith(":") != (members is not None):
            raise ValueError(f"{self.kind} {name!r}: the name of a family ends in a colon, and its members are listed")
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is there already, take another name; there are {self.listed()}")
        self._entries[name] = entry
        if members is not None:
            self._members[name] = members
        return entry

    def __getitem__(self, name: str) -> Entry:
        """The part of this name, or the family that it is a member of.

        Raises:
            ValueError: for an unknown name, listing what there is.
        """
        if name not in self:
            raise ValueError(self.unknown(name))
        family = _family(name)
        return self._entries[name if family is None else family]

    def __contains__(self, name: object) -> bool:
        family = _family(name) if isinstance(name, str) else None
        if family is None:
            return name in self._entries and name not in self._members
        return family in self._members and name in self._members_of(family)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def listed(self) -> str:
        """The names, as a sentence has them."""
        return ", ".join(f"{name}NAME" if name in self._members else name for name in self._entries)

    def search(self, pattern: Optional[str] = None) -> List[str]:
        """The names that fit a shell pattern (``*b3*``, ``timm:*b3*``), members of families among them; without a
        pattern all but those members."""
        if pattern is None:
            return [f"{name}NAME" if name in self._members else name for name in self._entries]
        names = [name for name in self._entries if name not in self._members]
        for family in self._members:
            names += self._members_of(family)
        return [name for name in names if fnmatchcase(name, pattern)]

    def unknown(self, name: object) -> str:
        """What is told of a name that is not there: ``KEY: expected one of …; got …``, with the nearest."""
        names = [known for known in self._entries if known not in self._members]
        family = _family(name) if isinstance(name, str) else None
        if family in self._members:
            names = self._members_of(str(family))
        close = difflib.get_close_matches(str(name), names, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return f"{self.key}: expected one of {self.listed()}; got {name!r}{hint}"

    def _members_of(self, family: str) -> List[str]:
        return [f"{family}{member}" for member in self._members[family]()]


def _family(name: str) -> Optional[str]:
    """``timm:`` of ``timm:resnet18``, None of a name without a colon."""
    head, colon, rest = name.partition(":")
    return head + colon if colon and rest else None
