"""The global random generators, and leaving them alone."""

import contextlib
import random
from typing import Iterator

import numpy as np
import torch

__all__ = ["own_randomness"]


@contextlib.contextmanager
def own_randomness() -> Iterator[None]:
    """A block after which the generators of Python, NumPy and PyTorch (the CPU's) are as they were before, whatever it
    seeds and draws."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
