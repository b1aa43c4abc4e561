"""What is made to go wrong in a run, from inside its process.

Only public seams are used: the optimizer's step, `checkpoints.save`, the model's methods, the system's calls. Each is
an *event*, written to the trace file as it begins (``SECONDS step 7``: the optimizer's seventh of the whole run), and a
place where a fault can strike.

A list of faults, each a dict, comes with the order for a run:

``{"do": "kill", "at": EVENT, "count": n, "after": seconds, "what": "run"|"group"|"worker"|"workers"}``
    SIGKILL to the process, to its group (data workers too), to one data worker or to all, so long after the n-th such
    event.
``{"do": "kill", "at": "bytes", "count": n}``
    SIGKILL when n bytes of checkpoints have been written, in the middle of a file.
``{"do": "wait", "at": EVENT, "count": n, "for": path}``
    Stand still until there is such a file.
``{"do": "delete", "at": EVENT, "count": n, "path": path}``
    Remove a file.
``{"do": "fill", "at": EVENT, "count": n, "path": path}``
    Write a file there until the disk is full.
``{"do": "nan", "texts": [...]}``
    Training batches with one of these texts have images that are not numbers.
``{"do": "clock", "shift": seconds, "jumps": seed}``
    The clock is so far off, and with ``jumps`` leaps to and fro by up to ten days whenever it is read.
``{"do": "freeze clock", "at": seconds}``
    The clock stands still.
``{"do": "limit files", "at": EVENT, "count": n, "bytes": n}``
    From then on, writing beyond n bytes of a file fails.
"""

import atexit
import datetime
import functools
import io
import os
import random
import resource
import signal
import threading
import time
from multiprocessing import active_children
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import torch

from lavis_kvmod import Blip2OPTKVMod
from lavis_kvmod.weights import files as checkpoints

EVENTS = ("start", "step", "save", "saved", "evaluate", "bytes", "file", "end")
_TRACED = EVENTS[:5] + EVENTS[7:]


def install(order: Dict[str, Any]) -> None:
    """Put the faults of an order in their places."""
    events = _Events(order.get("trace"))
    for fault in order.get("faults", []):
        _KINDS[fault["do"]](fault, events)
    events.watch()
    events.meet("start")
    atexit.register(events.meet, "end")


class _Events:
    """Meets events, of this process alone: data workers are forked from it, and inherit the hooks."""

    def __init__(self, trace: Optional[str]):
        self._process = os.getpid()
        self._trace = None if trace is None else os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._awaited: List[Dict[str, Any]] = []

    def on(self, fault: Dict[str, Any], strike: Callable[[], None]) -> None:
        if fault["at"] not in EVENTS:
            raise ValueError(f"expected one of {EVENTS}, got {fault['at']!r}")
        self._awaited.append({"at": fault["at"], "left": fault.get("count", 1), "strike": strike})

    def meet(self, event: str, amount: int = 1, note: Any = "") -> None:
        if os.getpid() != self._process:
            return
        if self._trace is not None and event in _TRACED:
            os.write(self._trace, f"{time.monotonic():.4f} {event} {note}\n".encode())
        for awaited in self._awaited:
            if awaited["at"] == event and awaited["left"] > 0:
                awaited["left"] -= amount
                if awaited["left"] <= 0:
                    awaited["strike"]()

    def watch(self) -> None:
        """Hook all that is an event."""
        take, save, write = torch.optim.AdamW.step, checkpoints.save, torch.save
        predict = Blip2OPTKVMod.predict_answers

        def step(optimizer, *args, **kwargs):
            counts = [int(state["step"]) for state in optimizer.state.values()]
            self.meet("step", note=max(counts, default=0) + 1)
            return take(optimizer, *args, **kwargs)

        def save_with_events(contents, path):
            self.meet("save", note=Path(path).name)
            save(contents, path)
            self.meet("saved", note=Path(path).name)

        @functools.wraps(predict)  # tasks look at what it takes
        def predict_with_event(model, *args, **kwargs):
            self.meet("evaluate")
            return predict(model, *args, **kwargs)

        def save_counted(contents, file, *args, **kwargs):
            return write(
                contents, _Counted(file, self) if isinstance(file, io.BufferedWriter) else file, *args, **kwargs
            )

        torch.optim.AdamW.step = step
        torch.save = save_counted
        checkpoints.save = save_with_events
        Blip2OPTKVMod.predict_answers = predict_with_event
        for name in ("replace", "link", "unlink", "rename", "fsync"):
            setattr(os, name, self._with_event(getattr(os, name)))

    def _with_event(self, call):
        def called(*args, **kwargs):
            self.meet("file")
            return call(*args, **kwargs)

        return called


class _Counted:
    """A file that meets an event for every part that is written."""

    def __init__(self, file, events: _Events):
        self._file, self._events = file, events

    def write(self, data) -> int:
        view = memoryview(data)
        for start in range(0, len(view), 4096):
            self._file.write(view[start : start + 4096])
            self._file.flush()
            self._events.meet("bytes", amount=len(view[start : start + 4096]))
        return len(view)

    def flush(self) -> None:
        self._file.flush()


def _kill(fault: Dict[str, Any], events: _Events) -> None:
    def strike() -> None:
        what = fault.get("what", "run")
        if what == "worker":
            workers = sorted(active_children(), key=lambda process: process.pid)
            os.kill(workers[fault.get("which", 0) % len(workers)].pid, signal.SIGKILL)
        elif what == "workers":
            for worker in active_children():
                os.kill(worker.pid, signal.SIGKILL)
        elif what == "group":
            os.killpg(os.getpgrp(), signal.SIGKILL)
        else:
            os.kill(os.getpid(), signal.SIGKILL)

    def strike_later() -> None:
        threading.Timer(fault["after"], strike).start()

    events.on(fault, strike_later if fault.get("after") else strike)


def _wait(fault: Dict[str, Any], events: _Events) -> None:
    def strike() -> None:
        while not os.path.exists(fault["for"]):
            time.sleep(0.01)

    events.on(fault, strike)


def _delete(fault: Dict[str, Any], events: _Events) -> None:
    events.on(fault, lambda: os.remove(fault["path"]))


def _fill(fault: Dict[str, Any], events: _Events) -> None:
    def strike() -> None:
        with open(fault["path"], "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

    events.on(fault, strike)


def _nan(fault: Dict[str, Any], events: _Events) -> None:
    forward = Blip2OPTKVMod.forward

    @functools.wraps(forward)
    def forward_with_nan(model, samples):
        if model.training and set(fault["texts"]) & set(samples["text_input"]):
            samples = {**samples, "image": torch.full_like(samples["image"], float("nan"))}
        return forward(model, samples)

    Blip2OPTKVMod.forward = forward_with_nan


def _set_clock(read: Callable[[], float]) -> None:
    class Datetime(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromtimestamp(read(), tz)

    time.time = read
    datetime.datetime = Datetime


def _clock(fault: Dict[str, Any], events: _Events) -> None:
    real, choose = time.time, random.Random(fault.get("jumps"))

    def read() -> float:
        leap = choose.uniform(-10, 10) * 86400 if "jumps" in fault else 0
        return real() + fault.get("shift", 0) + leap

    _set_clock(read)


def _freeze_clock(fault: Dict[str, Any], events: _Events) -> None:
    _set_clock(lambda: fault["at"])


def _limit_files(fault: Dict[str, Any], events: _Events) -> None:
    def strike() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error instead, as a full disk gives
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], resource.RLIM_INFINITY))

    events.on(fault, strike)


_KINDS = {
    "kill": _kill,
    "wait": _wait,
    "delete": _delete,
    "fill": _fill,
    "nan": _nan,
    "clock": _clock,
    "freeze clock": _freeze_clock,
    "limit files": _limit_files,
}
