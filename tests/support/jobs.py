"""What a worker of a study does in a test: wait, as a training does, until it is asked to stop."""

import signal
import time
from pathlib import Path

from lavis_kvmod.runners.signals import Stopped
from lavis_kvmod.studies.running import _quietly
from lavis_kvmod.studies.study import Member

__all__ = ["train_until_stopped"]


def _stop(signum: int, frame: object) -> None:
    signal.signal(signum, signal.SIG_DFL)  # as at the end of a run: the pool may send another
    raise Stopped(signum)


def train_until_stopped(folder: str, number: int) -> None:
    """Leave ``folder/number`` and be busy until SIGTERM; then end as a run does that has saved."""
    member = Member("A0", number, "run.yaml", [], Path(folder) / f"run{number}", "", "test")
    with _quietly(member):
        signal.signal(signal.SIGTERM, _stop)
        (Path(folder) / str(number)).touch()
        time.sleep(100)
