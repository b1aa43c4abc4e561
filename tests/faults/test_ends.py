"""Two processes that have finished are told as finished, however gloo's threads stand at that moment."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TIMES, WHOLE = 200, 5
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def test_no_finished_run_is_told_as_failed(record, place):
    """Short runs that only end as a training does, and whole ones by the command a user types."""
    with record.attempt("ended by several processes", times=TIMES + WHOLE):
        command = [sys.executable, str(Path(__file__).with_name("many_ends.py")), str(TIMES)]
        done = subprocess.run(command, env=ENV, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads(done.stdout) == {"[0, 0]": TIMES}
        run = place("whole", max_epoch=1, valid_splits=[], resume_ckpt_path=None)
        run.folder.mkdir()
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        for _ in range(WHOLE):
            done = subprocess.run(
                [*torchrun, "-m", "lavis.train", "--cfg-path", run.cfg_path],
                cwd=run.folder,
                env=ENV,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr[-3000:]
