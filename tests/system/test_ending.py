"""How a process that is one of several ends; each in a process of its own, forked."""

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from lavis_kvmod.system.ending import run_and_end


def ended(main, *, several=True):
    """Exit code and output of a forked process that runs and ends ``main`` as one of several."""
    with tempfile.TemporaryFile("w+") as output:
        pid = os.fork()
        if pid == 0:
            for standard in (1, 2):
                os.dup2(output.fileno(), standard)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            atexit._clear()  # what pytest and its plugins have registered is theirs
            os.environ.update({"RANK": "0", "WORLD_SIZE": "1"} if several else {})
            try:
                run_and_end(main)
            except SystemExit as stop:
                sys.stdout.write(f"left to the interpreter: {stop.code}")
            finally:
                sys.stdout.flush()
                os._exit(99)
        _, status = os.waitpid(pid, 0)
        output.seek(0)
        return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), output.read()


def raises(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "status", "told"),
    [
        (lambda: 0, 0, ""),
        (lambda: 2, 2, ""),
        (raises(SystemExit()), 0, ""),
        (raises(SystemExit(128 + signal.SIGTERM)), 143, ""),
        (raises(SystemExit("no such file")), 1, "no such file\n"),
        (raises(KeyboardInterrupt()), 130, "KeyboardInterrupt"),
        (raises(OSError("the disk is on fire")), 1, "OSError: the disk is on fire"),
    ],
)
def test_the_status_is_what_a_scheduler_reads(main, status, told):
    code, output = ended(main)
    assert code == status and told in output, output
    assert ("Traceback" in output) == (told not in ("", "no such file\n"))


def test_what_was_begun_is_finished(tmp_path):
    """What is registered for the end is run, what is written arrives, and data workers go."""

    def main():
        atexit.register((tmp_path / "registered").write_text, "run")
        main.loader = iter(DataLoader(range(100), num_workers=1))
        next(main.loader)
        (tmp_path / "worker").write_text(str(multiprocessing.active_children()[0].pid))
        print("the last words", end="")
        return 0

    start = time.monotonic()
    code, output = ended(main)
    assert code == 0 and output == "the last words" and time.monotonic() - start < 20
    assert (tmp_path / "registered").read_text() == "run"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "worker").read_text()), 0)


def test_one_process_alone_ends_as_python_does():
    assert ended(lambda: 3, several=False) == (99, "left to the interpreter: 3")


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_the_commands_end_so(command):
    """Here for want of an argument, which is told with status 2."""
    path = Path(__file__).parents[2] / "lavis_kvmod" / "commands" / f"{command}.py"

    def main():
        sys.argv = [path.name]
        runpy.run_path(str(path), run_name="__main__")

    code, output = ended(main)
    assert code == 2 and "--cfg-path" in output and "left to the interpreter" not in output
