"""``python many_ends.py TIMES``: two processes with a gloo group train a few steps and end as `lavis.train` ends, again
and again. Prints how often each pair of exit codes came, as JSON.

``--as-python-does`` leaves the end to the interpreter, which gloo's threads then abort now and then.
"""

import collections
import json
import os
import socket
import sys

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch.nn.parallel import DistributedDataParallel

from lavis_kvmod.system.distributed import gather, init_distributed, leaves_group
from lavis_kvmod.system.ending import run_and_end


def short_run() -> int:
    """What a run does with its process group."""
    with leaves_group():
        init_distributed(OmegaConf.create({"device": "cpu"}))
        model = DistributedDataParallel(torch.nn.Linear(64, 64))
        for _ in range(3):
            model(torch.randn(4, 64)).sum().backward()
        rows = gather([dist.get_rank()])
        assert rows == [0, 1], rows
    return 0


def exit_codes(as_python_does: bool) -> list:
    """Of both ranks of one run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    os.environ.update(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    pids = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            if as_python_does:
                sys.exit(short_run())
            run_and_end(short_run)
        pids.append(pid)
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    return [-os.WTERMSIG(s) if os.WIFSIGNALED(s) else os.WEXITSTATUS(s) for s in statuses]


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = collections.Counter()
    for _ in range(int(sys.argv[1])):
        found[str(exit_codes("--as-python-does" in sys.argv))] += 1
    print(json.dumps(found))
