"""Seeds from names: the same everywhere, and gone after the block."""

import random

import numpy as np
import pytest
import torch

from lavis_kvmod.datasets.seeding import seeded, stable_hash


def draws():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_the_same_parts_give_the_same_draws_whatever_was_drawn_before():
    with seeded(42, 1, "photo"):
        first = draws()
    draws()
    with seeded(42, 1, "photo"):
        assert draws() == first


@pytest.mark.parametrize(
    "parts", [(42, 2, "photo"), (43, 1, "photo"), (42, 1, "photos"), (42, "1", "photo"), (421, "photo")]
)
def test_other_parts_give_other_draws_from_each_generator(parts):
    with seeded(42, 1, "photo"):
        first = draws()
    with seeded(*parts):
        assert all(a != b for a, b in zip(first, draws()))


def test_the_generators_go_on_as_if_nothing_had_been_drawn():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = [draws() for _ in range(3)]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    got = [draws()]
    with seeded("a"):
        draws()
    got.append(draws())
    with pytest.raises(KeyError), seeded("b"):
        draws()
        raise KeyError
    got.append(draws())
    assert got == expected


def test_another_process_gets_the_same_seed():
    """Unlike Python's hash of a string, which changes with each process: this was computed in another one."""
    assert stable_hash(42, 3, "train-00000007") == 8221820882486789452


def test_numbers_of_numpy_and_torch_count_as_the_numbers_they_are():
    assert stable_hash(np.int64(7), "a") == stable_hash(torch.tensor(7), "a") == stable_hash(7, "a")
    with pytest.raises(TypeError):
        stable_hash(0.5)


def test_a_seed_is_a_number_that_every_generator_takes():
    for i in range(200):
        with seeded(i):
            assert 0 <= stable_hash(i) < 2**63
