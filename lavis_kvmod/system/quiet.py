"""Warnings about which a user can do nothing, and those that have been told often enough."""

import logging
import warnings
from collections import Counter
from contextlib import contextmanager
from typing import Dict, Iterable, Iterator, List, NamedTuple, Tuple

__all__ = ["CountsWarnings", "LibraryWarning", "WarningTally", "gathered_warnings", "hide_deprecations"]

# Warnings of one cause that are told each; behind them only every doubling of their number is.
_SHOWN = 12


class CountsWarnings(logging.Filter):
    """For a log handler: of a cause, which is a line of code, it passes the first warnings, then tells their number
    whenever it has doubled. What concerns every sample of an epoch would else be all that a log holds."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers: Dict[Tuple[str, int], int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is passed; one that stands for others says so."""
        if record.levelno != logging.WARNING:
            return True
        cause = (record.pathname, record.lineno)
        number = self._numbers[cause] = self._numbers.get(cause, 0) + 1
        if number < _SHOWN:
            return True
        times, rest = divmod(number, _SHOWN)
        if rest or times & (times - 1):
            return False
        record.msg = f"{record.getMessage()} ({number} warnings of this kind so far; the next is told at {2 * number})"
        record.args = ()
        return True


class LibraryWarning(NamedTuple):
    """What Python's ``warnings`` were told: a text, and the line of code that said it, which is its cause."""

    text: str
    file: str
    line: int


@contextmanager
def gathered_warnings() -> Iterator[List[LibraryWarning]]:
    """Takes what is said within, each time it is said, and fills the list at the end; what a filter hides stays hidden.

    Pillow's warnings of an image would else be a line for each file, since their texts differ.
    """
    gathered: List[LibraryWarning] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", append=True)
            yield gathered
    finally:
        gathered += [LibraryWarning(str(each.message), each.filename, each.lineno) for each in caught]


class WarningTally:
    """Logs the first warning of a cause, and how many there have been at 10, 100, 1000, …"""

    def __init__(self) -> None:
        self._numbers: Dict[Tuple[str, int], int] = Counter()

    def tell(self, gathered: Iterable[LibraryWarning]) -> None:
        """Count these."""
        for told in gathered:
            cause = (told.file, told.line)
            self._numbers[cause] += 1
            number = self._numbers[cause]
            if str(number).strip("0") == "1":
                count = "" if number == 1 else f"; {number} of this kind so far"
                logging.warning("%s (%s, line %d%s; others like it are counted)", told.text, *cause, count)


def hide_deprecations() -> None:
    """Hide what PyTorch says, on import and at every call, of functions that LAVIS's pinned dependencies use."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|fairscale|timm)\b")
    # The new name is unknown to the older PyTorch that this package allows.
    warnings.filterwarnings("ignore", category=FutureWarning, message="`broadcast_buffers` is deprecated")
