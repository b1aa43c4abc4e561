"""Randomness that depends on names alone: a sample is augmented alike whoever reads it, in whatever order.

A resumed run may then start in the middle of an epoch without replaying it, and the number of workers changes nothing.
"""

import contextlib
import hashlib
import operator
import random
from typing import Iterator, Union

import numpy as np
import torch

from lavis_kvmod.system.randomness import own_randomness

__all__ = ["seed_from", "seeded", "stable_hash"]

Part = Union[int, str]


def stable_hash(*parts: Part) -> int:
    """A number of 63 bits from numbers and texts, such as (run seed, epoch, sample id).

    The same on every machine and in every process, unlike Python's ``hash``. Other parts give another, also where
    they only read alike: ``1`` and ``"1"``, or ``"ab", "c"`` and ``"a", "bc"``.

    Raises:
        TypeError: for what is neither a whole number nor a text.
    """
    digest = hashlib.sha256()
    for part in parts:
        text = (f"str:{part}" if isinstance(part, str) else f"int:{operator.index(part)}").encode(
            "utf-8", "surrogatepass"
        )
        digest.update(len(text).to_bytes(8, "little") + text)
    return int.from_bytes(digest.digest()[:8], "little") >> 1


def seed_from(*parts: Part) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators (the CPU's) from `stable_hash`."""
    seed = stable_hash(*parts)
    random.seed(seed)
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
    # torch.manual_seed would reset the GPUs' generators too, which the training needs as they are.
    torch.default_generator.manual_seed(seed)


@contextlib.contextmanager
def seeded(*parts: Part) -> Iterator[None]:
    """Seed the three for the block alone."""
    with own_randomness():
        seed_from(*parts)
        yield
