"""A second process for half of the work, and an end in common."""

import logging
import multiprocessing
import signal
import sys
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Callable, Optional, Tuple, Type

__all__ = ["SecondProcess", "SecondProcessError"]

# Seconds in which a process that was asked to end may save.
_PATIENCE = 60


class SecondProcessError(RuntimeError):
    """What the second process was to do has failed."""


class SecondProcess:
    """A context in which ``function(*arguments)`` runs in a process of its own; `result` waits for what it returns.

    An error there is told there, at once and with its traceback, and by `result` in a line. If this process leaves the
    context by an error of its own, or a Ctrl-C, the other is asked to end (SIGTERM: a training saves first) and waited
    for, so that nothing is left behind.

    Args:
        name: for messages.
        function, arguments: importable by name, and picklable; so is what is returned.
    """

    def __init__(self, name: str, function: Callable[..., Any], *arguments: Any):
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
        self.name = name
        self._receives, sends = context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(sends, function, arguments), name=name)
        self._process.start()
        sends.close()  # the other's end of the pipe is the only one, so that its death is seen

    def __enter__(self) -> "SecondProcess":
        return self

    def result(self) -> Any:
        """What the function returns.

        Raises:
            SecondProcessError: if it raised, or its process is gone.
        """
        try:
            is_whole, value = self._receives.recv()
        except EOFError:
            self._process.join()
            raise SecondProcessError(f"{self.name}: its process ended with status {self._process.exitcode}") from None
        if not is_whole:
            raise SecondProcessError(f"{self.name}: {value}")
        return value

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        if kind is not None:
            self._process.terminate()
        self._process.join(_PATIENCE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._receives.close()


def _work(sends: Connection, function: Callable[..., Any], arguments: Tuple[Any, ...]) -> None:
    try:
        sends.send((True, function(*arguments)))
    except KeyboardInterrupt:  # a terminal sends it to both, and one traceback is enough
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        logging.exception("failed")
        sends.send((False, f"{type(error).__name__}: {error}"))
