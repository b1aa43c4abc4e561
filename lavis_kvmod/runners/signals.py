"""SIGTERM and Ctrl-C: save first, then go."""

import logging
import os
import signal
import threading
from contextlib import contextmanager
from types import FrameType
from typing import Any, Dict, Iterator, Optional

__all__ = ["StopSignals", "Stopped"]


class Stopped(SystemExit):
    """The run was asked to stop and has saved; the process exits with 128 + the signal's number, as shells do."""

    def __init__(self, signum: int):
        super().__init__(128 + signum)
        self.signum = signum


class StopSignals:
    """While in force, SIGTERM and SIGINT set `received`, which the run looks at after each step.

    A Ctrl-C after either stops at once. Inside `nothing_to_save`, where all that was trained is on the disk, the first
    signal of either kind does.
    """

    def __init__(self) -> None:
        self.received: Optional[int] = None
        self._at_once = False
        self._process = os.getpid()
        self._previous: Dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        self.received, self._process = None, os.getpid()
        if threading.current_thread() is threading.main_thread():  # Python sets handlers nowhere else
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    @contextmanager
    def nothing_to_save(self) -> Iterator[None]:
        """Here a signal stops the run at once, as does one that came before."""
        self._at_once = True
        try:
            if self.received is not None:
                raise Stopped(self.received)
            yield
        finally:
            self._at_once = False

    def _handle(self, signum: int, frame: Optional[FrameType]) -> None:
        if os.getpid() != self._process:  # a data worker, forked with our handlers
            return
        if self._at_once:
            self.received = signum
            raise Stopped(signum)
        if self.received is None:
            self.received = signum
            logging.warning("%s: saving after this step, then stopping", signal.Signals(signum).name)
        elif signum == signal.SIGINT:
            raise KeyboardInterrupt
