"""Memory that is freed and taken again is not given back in between."""

import ctypes
import multiprocessing
import resource
import sys

import numpy as np
import pytest

from lavis_kvmod.system.allocator import keep_freed_memory, may_keep


def _faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        [np.ones(2**20) for _ in range(4)]  # 8 MiB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _measure(sends):
    ctypes.CDLL("libc.so.6").mallopt(-1, 2**17)  # what glibc begins with
    before = _faults()
    was_done = keep_freed_memory()
    _faults()  # once they must be taken
    sends.send((before, was_done, _faults()))


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_pages_are_kept():
    fork = multiprocessing.get_context("fork")  # what is set here is not to stay with the other tests
    receives, sends = fork.Pipe(duplex=False)
    process = fork.Process(target=_measure, args=(sends,))
    process.start()
    before, was_done, after = receives.recv()
    process.join()
    assert was_done and before > 5_000 and after < before / 10


def test_what_the_user_has_chosen_stands():
    assert may_keep("linux", {}) and not may_keep("darwin", {}) and not may_keep("win32", {})
    assert not may_keep("linux", {"LD_PRELOAD": "/usr/lib/libjemalloc.so.2"})
    assert not may_keep("linux", {"MALLOC_TRIM_THRESHOLD_": "131072"})
