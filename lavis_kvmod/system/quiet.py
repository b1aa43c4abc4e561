"""Warnings about which a user can do nothing, and those that have been told often enough."""

import logging
import warnings
from typing import Dict, Tuple

__all__ = ["CountsWarnings", "hide_deprecations"]

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


def hide_deprecations() -> None:
    """Hide what PyTorch says, on import and at every call, of functions that LAVIS's pinned dependencies use."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|fairscale|timm)\b")
    # The new name is unknown to the older PyTorch that this package allows.
    warnings.filterwarnings("ignore", category=FutureWarning, message="`broadcast_buffers` is deprecated")
