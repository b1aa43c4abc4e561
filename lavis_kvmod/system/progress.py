"""Progress of long work: a bar on a terminal, plain lines in a log."""

import logging
import sys
import time
from contextlib import contextmanager
from typing import Iterable, Iterator, Optional, Sized, cast

from lavis.common.dist_utils import is_main_process
from tqdm import tqdm

_has_terminal_alone = True


@contextmanager
def sharing_terminal(name: str) -> Iterator[None]:
    """Within, this process is one of several that write to a terminal: ``name`` stands in front of its log lines, and
    progress is lines, as bars would write over each other."""
    global _has_terminal_alone

    class NamedRecord(logging.LogRecord):
        def getMessage(self) -> str:
            return f"{name} | " + super().getMessage().replace("\n", f"\n{name} | ")

    before, factory = _has_terminal_alone, logging.getLogRecordFactory()
    _has_terminal_alone = False
    logging.setLogRecordFactory(NamedRecord)
    try:
        yield
    finally:
        _has_terminal_alone = before
        logging.setLogRecordFactory(factory)


class Progress:
    """Iterate with a bar if a person is watching, else with a log line every ``log_every`` items.

    Args:
        iterable: anything with a length.
        title: what is going on.
        log_every: log lines' distance, where there is no terminal.
        start, total: where in the whole it begins, and how long that is (by default all of ``iterable``).
    """

    def __init__(
        self, iterable: Iterable, title: str, log_every: int = 50, start: int = 0, total: Optional[int] = None
    ):
        self._iterable = iterable
        self._start, self._total = start, total
        self._title = title
        self._log_every = log_every
        self._status = ""
        self._bar: Optional[tqdm] = None

    def status(self, text: str) -> None:
        """Show ``text`` (such as the loss) beside the progress."""
        self._status = text
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def __iter__(self) -> Iterator:
        if not is_main_process():
            yield from self._iterable
        elif sys.stderr.isatty() and _has_terminal_alone:
            # A bar must not share its line with log records.
            self._bar = tqdm(
                self._iterable,
                initial=self._start,
                total=self._total,
                desc=self._title,
                leave=False,
                dynamic_ncols=True,
            )
            yield from self._bar
        else:
            yield from self._logged()

    def _logged(self) -> Iterator:
        total = len(cast(Sized, self._iterable)) if self._total is None else self._total
        start = time.monotonic()
        for i, item in enumerate(self._iterable, start=self._start + 1):
            yield item
            if i % self._log_every == 0 or i == total:
                left = (time.monotonic() - start) / (i - self._start) * (total - i)
                logging.info("%s [%d/%d] %s eta %s", self._title, i, total, self._status, clock(left))


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def resident_peak_gib() -> float:
    """The most memory this process has held so far, in GiB (0 where the system does not tell)."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
