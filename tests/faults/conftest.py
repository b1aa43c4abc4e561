"""Runs that are made to fail: real processes and real SIGKILL, on the small model; and the record of what was lost."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import pytest
import torch
from whole_runs import assert_same_run, write_run  # noqa: F401

from lavis_kvmod.weights import files as checkpoints

ROOT = Path(__file__).parents[2]
LAST = "checkpoint_last.pth"

# Seconds after which a run that should have ended is given up.
PATIENCE = 120


# ------------------------------------------------------------ the record


# Every fault that is tried, as docs/reliability.md and output/faults.json name it.
FAULTS = (
    "killed in a training step",
    "killed while a checkpoint is written",
    "killed in an evaluation",
    "killed while starting up again",
    "killed at any moment",
    "rank killed",
    "ended by several processes",
    "data worker killed",
    "shard deleted while training",
    "disk full",
    "checkpoint damaged",
    "one bit of a checkpoint flipped",
    "clock set to and fro",
    "runs begun in the same second",
    "two runs begun in one output folder",
    "two runs going on in one run folder",
    "NaN batch",
)


class Attempt:
    """One try of a fault, or several (``times``) that only their common end can judge."""

    def __init__(self, times: int):
        self.times = times
        self.lost: Dict[str, int] = {}
        self.told: List[str] = []

    def loses(self, what: str, amount: int) -> None:
        """``amount`` of something had to be done again, or is gone. Of several, the largest is told."""
        self.lost[what] = max(amount, self.lost.get(what, 0))

    def notes(self, text: str) -> None:
        """Something that whoever reads the record must know."""
        self.told.append(text)


class Record:
    """Counts, for each fault, how often it was tried and survived, and says what was lost."""

    def __init__(self):
        self.attempts: Dict[str, List[Tuple[Attempt, bool]]] = {}

    @contextmanager
    def attempt(self, fault: str, times: int = 1) -> Iterator[Attempt]:
        """Counts as survived if the block ends without an error."""
        if fault not in FAULTS:
            raise ValueError(f"{fault!r}: not among FAULTS, and so not in docs/reliability.md")
        attempt, survived = Attempt(times), False
        try:
            yield attempt
            survived = True
        except BaseException as error:
            attempt.times = max(attempt.times, 1)
            attempt.notes(f"not survived: {type(error).__name__}")
            raise
        finally:
            self.attempts.setdefault(fault, []).append((attempt, survived))

    def rows(self) -> List[Dict[str, Any]]:
        """``fault``, ``tried``, ``survived``, ``lost`` of each that was tried."""
        rows = []
        for fault in (fault for fault in FAULTS if fault in self.attempts):
            attempts = [attempt for attempt, _ in self.attempts[fault]]
            kinds = sorted({what for attempt in attempts for what in attempt.lost})
            most = {what: max(attempt.lost.get(what, 0) for attempt in attempts) for what in kinds}
            lost = [f"at most {amount} {what}" for what, amount in most.items() if amount] or ["nothing"]
            notes = sorted({text for attempt in attempts for text in attempt.told})
            rows.append(
                {
                    "fault": fault,
                    "tried": sum(attempt.times for attempt in attempts),
                    "survived": sum(attempt.times for attempt, survived in self.attempts[fault] if survived),
                    "lost": "; ".join(lost + notes),
                }
            )
        return rows

    def write(self, path: Path) -> None:
        """Its rows into a JSON file, beside what an earlier session wrote there of other faults."""
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        rows = {row["fault"]: row for row in [*earlier, *self.rows()]}
        ordered = [rows[fault] for fault in FAULTS if fault in rows]
        with checkpoints.whole_or_nothing(path) as temporary:
            temporary.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def faults():
    """The names of all faults."""
    return FAULTS


@pytest.fixture(scope="session")
def record():
    """The session's `Record`, written to output/faults.json (or ``LAVIS_KVMOD_FAULTS``) when it ends."""
    made = Record()
    yield made
    if made.attempts:
        made.write(Path(os.environ.get("LAVIS_KVMOD_FAULTS") or ROOT / "output" / "faults.json"))


# ------------------------------------------------------------ processes


class Run:
    """A run in a process of its own; see fork_server.py.

    Attributes:
        pid: of the process, and of its group.
    """

    def __init__(self, server: Path, order: Dict[str, Any]):
        self._output = Path(order["output"])
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(server))
        self._socket.settimeout(PATIENCE)
        self._lines = self._socket.makefile("rw")
        print(json.dumps(order), file=self._lines, flush=True)
        self.pid = int(self._lines.readline())
        self.code: Optional[int] = None

    @property
    def output(self) -> str:
        """What it has written to standard output and error so far."""
        return self._output.read_text() if self._output.exists() else ""

    @property
    def end(self) -> str:
        """The last lines of it."""
        return "\n".join(self.output.splitlines()[-25:])

    def wait(self, seconds: float = PATIENCE) -> int:
        """Its exit code; negative for the signal that killed it."""
        if self.code is None:
            self._socket.settimeout(seconds)
            try:
                self.code = int(self._lines.readline())
            except TimeoutError:
                self.kill(group=True)
                pytest.fail(f"still running after {seconds} s:\n{self.end}")
            self._lines.close()
            self._socket.close()
        return self.code

    def wait_for(self, text: str) -> None:
        """Until it has written this."""
        end = time.monotonic() + PATIENCE
        while text not in self.output:
            assert time.monotonic() < end, f"{text!r} never came:\n{self.end}"
            time.sleep(0.02)

    def kill(self, group: bool = False) -> None:
        """SIGKILL, to it or to all it has started too."""
        try:
            (os.killpg if group else os.kill)(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The socket of a running fork server."""
    path = tmp_path_factory.mktemp("server") / "socket"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(Path(__file__).with_name("fork_server.py")), str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        yield path
        process.terminate()  # the end of its input might not reach it: what is forked from here inherits the pipe


@dataclass
class Place:
    """A folder in which runs are started one after the other, as a user does who starts a run again.

    Attributes:
        folder: where the user stands.
        notes: where the runs' output and traces go.
    """

    server: Path
    cfg_path: str
    folder: Path
    notes: Path
    runs: List[Run] = field(default_factory=list)

    @property
    def output_dir(self) -> Path:
        """The runs' ``output_dir``."""
        return self.folder / "output"

    def start(self, *faults: Dict[str, Any], options: Sequence[str] = (), env: Optional[Dict[str, str]] = None) -> Run:
        """Start a run, with these faults (see inject.py)."""
        self.notes.mkdir(parents=True, exist_ok=True)
        number = len(self.runs)
        order = {
            "folder": str(self.folder),
            "arguments": ["--cfg-path", self.cfg_path, *(["--options", *options] if options else [])],
            "output": str(self.notes / f"output-{number}.txt"),
            "env": env or {},
            "faults": {"trace": str(self._trace_path(number)), "faults": faults},
        }
        self.runs.append(Run(self.server, order))
        return self.runs[-1]

    def _trace_path(self, number: int) -> Path:
        return self.notes / f"trace-{number}.txt"

    def steps(self, run: Optional[Run] = None) -> List[int]:
        """The optimizer steps that a run (the last one) has begun, by their number in the whole training, from 1."""
        return [int(note) for _, event, note in self.events(run) if event == "step"]

    def seconds(self, first: str, then: str) -> float:
        """How long the last run took from the first such event to the next such event."""
        times = [(event, when) for when, event, _ in self.events()]
        start = next(when for event, when in times if event == first)
        return next(when for event, when in times if event == then and when > start) - start

    def events(self, run: Optional[Run] = None) -> List[Tuple[float, str, str]]:
        """Time, kind and note of each event of a run (the last one); see inject.py."""
        path = self._trace_path(self.runs.index(run) if run else len(self.runs) - 1)
        lines = path.read_text().splitlines() if path.exists() else []
        return [(float(when), event, note) for when, event, note in (line.split(" ") for line in lines)]

    def folders(self) -> List[Path]:
        """The run folders, in order of their names."""
        return sorted(p for p in self.output_dir.iterdir() if p.is_dir()) if self.output_dir.is_dir() else []

    def finish(self, *faults: Dict[str, Any], **settings) -> Path:
        """Start a run, with faults that it survives, see it end well, and return the folder it wrote into."""
        run = self.start(*faults, **settings)
        assert run.wait() == 0, run.end
        return self.newest()

    def newest(self) -> Path:
        """The folder of the run begun last that has saved something."""
        return [folder for folder in self.folders() if (folder / LAST).is_file()][-1]


@pytest.fixture()
def place(server, write_run, tmp_path):  # noqa: F811
    """A function: a `Place` by its name; all of a test's have the run file of the first, which takes the settings."""
    places: List[Place] = []
    settled: Dict[str, str] = {}

    def make(name: str, folder: Optional[Path] = None, **settings) -> Place:
        if "path" not in settled:
            settled["path"] = write_run(**{"resume_ckpt_path": "auto", **settings})
        elif settings:
            raise ValueError("the settings are the first place's")
        places.append(Place(server, settled["path"], folder or tmp_path / name, tmp_path / name))
        return places[-1]

    yield make
    for made in places:
        for run in made.runs:
            run.kill(group=True)


# ------------------------------------------------------------ what must hold


def _tensors(optimizer: Dict[str, Any]) -> Iterator[Tuple[str, torch.Tensor]]:
    for number, state in optimizer["state"].items():
        yield from ((f"{name} of parameter {number}", value) for name, value in state.items())


def _steps_saved(path: Path) -> int:
    """How many optimizer steps a checkpoint stands behind, as AdamW itself counts them."""
    counts = [int(state["step"]) for state in checkpoints.read(path)["optimizer"]["state"].values()]
    return max(counts, default=0)


@pytest.fixture(scope="session")
def steps_saved():
    """A function: how many optimizer steps a checkpoint stands behind."""
    return _steps_saved


@pytest.fixture(scope="session")
def assert_good():
    """A function: a checkpoint is whole, holds what a run needs, and every number in it is finite."""

    def check(path: Path) -> None:
        contents = checkpoints.read(path)
        assert {"model", "optimizer", "epoch"} <= set(contents)
        for name, value in [*contents["model"].items(), *_tensors(contents["optimizer"])]:
            assert torch.isfinite(value).all(), name

    return check
