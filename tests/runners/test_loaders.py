"""From data sets to loaders: which are mixed, and which give an image once for its questions."""

import pytest
import torch

from lavis_kvmod.datasets.digits import DigitsVQADataset
from lavis_kvmod.datasets.loading.loader import Loader
from lavis_kvmod.datasets.loading.mixture import Mixture
from lavis_kvmod.runners.loaders import make_loader, make_loaders
from lavis_kvmod.runners.resuming import find_position
from lavis_kvmod.runners.training_state import RunState

ONE = dict(num_workers=0, seed=1, rank=0, world_size=1, pin_memory=False)


def make(split, dataset):
    return make_loader(split, dataset, is_train=split == "train", may_be_empty=False, batch_size=4, **ONE)


@pytest.fixture()
def digits():
    return DigitsVQADataset(lambda image: torch.zeros(3, 4, 4), str, "val")


def test_data_sets_are_concatenated_or_mixed(digits):
    sets = {"one": {"train": digits, "val": digits}, "two": {"train": digits}}
    whole, loaders = make_loaders(sets, make, seed=0)
    assert len(whole["train"]) == 2 * len(whole["val"]) == 2 * len(digits)
    assert {type(loader) for loader in loaders.values()} == {Loader}
    _, mixed = make_loaders(sets, make, seed=0, ratios={"one": 1, "two": 2})
    assert isinstance(mixed["train"], Mixture) and isinstance(mixed["val"], Loader)
    assert len(mixed["train"]) == 2 * -(-len(digits) // 4) and len(mixed["train"].dataset) == 2 * len(digits)
    _, cut = make_loaders(sets, make, seed=0, num_batches=7)
    assert len(cut["train"]) == 7
    with pytest.raises(ValueError, match="a number for each data set with a train split, one, two; got one, three"):
        make_loaders(sets, make, seed=0, ratios={"one": 1, "three": 2})


def test_grouping_is_a_choice(digits):
    apart, together = (
        make_loader(
            "train", digits, is_train=True, may_be_empty=False, batch_size=8, group_by_image=grouped, **ONE
        ).order["grouped"]
        for grouped in (False, True)
    )
    assert (apart, together) == (False, True)


def test_a_run_that_groups_now_begins_the_epoch_anew():
    state = RunState()
    state.batch = 3
    before = {"seed": 1, "num_samples": 9, "num_batches": 5, "global_batch": 2, "readers": None, "accum_grad_iters": 1}
    find_position(state, before, {**before, "grouped": False, "mixture": None})
    assert state.batch == 3  # a checkpoint of an older version
    find_position(state, before, {**before, "grouped": True})
    assert state.batch == 0
