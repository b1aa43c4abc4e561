"""A process that has imported LAVIS and forks a run whenever it is asked to, so that each starts in a moment.

``python fork_server.py SOCKET`` listens there until its standard input ends. One connection is one run: the client
writes a line of JSON (see `Place.start` in conftest.py), and reads the run's process id and, in the end, its exit code
on lines of their own. Between server and run stands a process that waits for the run, so that the server need not.
"""

import json
import logging
import os
import select
import signal
import socket
import sys

import inject
import torch

from lavis_kvmod.commands import evaluate, train  # noqa: F401  (also: all that a run imports, once)


def serve(path: str) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks for those that wait
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    print("ready", flush=True)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if listener not in ready:
            return
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            keep(connection)
            os._exit(0)
        connection.close()


def keep(connection: socket.socket) -> None:
    """Fork the run, tell its process id, wait, tell how it ended."""
    with connection, connection.makefile("rw") as lines:
        order = json.loads(lines.readline())
        pid = os.fork()
        if pid:
            print(pid, file=lines, flush=True)
            _, status = os.waitpid(pid, 0)
            print(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), file=lines, flush=True)
            return
    run(order)


def run(order: dict) -> None:
    """What ``python -m lavis.train`` does, in a process group and a folder of its own; does not return."""
    os.setsid()
    os.makedirs(order["folder"], exist_ok=True)
    os.chdir(order["folder"])
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(output, standard)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(order["env"])
    sys.argv = ["train.py", *order["arguments"]]
    inject.install(order["faults"])
    sys.exit(train.main(order["arguments"]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.raiseExceptions = False
    serve(sys.argv[1])
    os._exit(0)  # nothing to tidy
