"""The end of a process that is one of several: with the right status, and without a race.

As Python's interpreter ends it takes itself apart while gloo's threads go on. One of them that then wants the
interpreter is ended by force, and takes the process with it ("terminate called without an active exception", SIGABRT);
torchrun tells a finished run as failed. Leaving the process group before does not help. So such a process does all that
Python does at its end but for taking itself apart.
"""

import atexit
import multiprocessing
import os
import signal
import sys
from typing import Any, Callable, NoReturn

from lavis_kvmod.system.distributed import launched_rank

__all__ = ["run_and_end"]


def run_and_end(main: Callable[[], int]) -> NoReturn:
    """Run a command, and end the process with the status it returns: only for what a user starts, never in a library.

    One of several processes (`launched_rank`) ends without destructors, after data workers are ended, what was
    registered with `atexit` has run (log handlers, trackers, temporary folders) and what was written is flushed. Its
    status is Python's: 1 after an error, whose traceback is printed, what `SystemExit` carries (128 + the signal's
    number, of a run that was asked to stop), 130 after a Ctrl-C that could not wait.
    """
    if launched_rank(os.environ) is None:
        sys.exit(main())
    status = _status_of(main)
    _end_workers()
    atexit._run_exitfuncs()
    _flush()
    os._exit(status)


def _status_of(main: Callable[[], int]) -> int:
    try:
        return main()
    except SystemExit as stop:
        return _as_status(stop.code)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1


def _as_status(code: Any) -> int:
    """As the interpreter understands ``SystemExit(code)``."""
    if code is None or isinstance(code, int):
        return (code or 0) & 0xFF
    print(code, file=sys.stderr)
    return 1


def _end_workers() -> None:
    """Data workers only read. One that is asked to end would wait for a batch that nobody takes any more."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises at a worker's death
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
            child.join()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # whoever read it is gone, or it is closed
            continue
