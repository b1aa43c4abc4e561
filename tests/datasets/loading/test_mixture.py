"""Batches from several data sets: by ratio, each set's samples equally often, from any batch on."""

import collections

import pytest
import torch
from lavis.datasets.datasets.base_dataset import ConcatDataset

from lavis_kvmod.datasets.loading.loader import PADDING, Loader
from lavis_kvmod.datasets.loading.mixture import Mixture
from lavis_kvmod.datasets.loading.plans import SamplePlan
from lavis_kvmod.datasets.loading.samples import SampleSource

SIZES = {"many": 23, "few": 5}


class Named(torch.utils.data.Dataset):
    def __init__(self, name):
        self.name = name

    def __len__(self):
        return SIZES[self.name]

    def __getitem__(self, index):
        return {"name": f"{self.name} {index}", "drawn": torch.rand(())}


def mixture(num_batches=10, ratios=None, rank=0, world_size=1, batch_size=2, num_workers=0):
    loaders = {}
    for name in SIZES:
        plan = SamplePlan(SIZES[name], batch_size, seed=1, rank=rank, world_size=world_size)
        loaders[name] = Loader(SampleSource(Named(name), plan, seed=1), num_workers=num_workers)
    data = ConcatDataset([Named(name) for name in SIZES])
    return Mixture(loaders, ratios or {"many": 3, "few": 1}, num_batches=num_batches, dataset=data, seed=4)


def read(epoch, start=0, **options):
    loader = mixture(**options)
    loader.set_epoch(epoch, start)
    return [([] if PADDING in batch else batch["name"], batch["drawn"].tolist()) for batch in loader]


def test_batches_come_by_ratio_each_from_one_set():
    batches = read(0, num_batches=2000)
    assert len(batches) == 2000 == len(mixture(2000))
    sets = [{name.split()[0] for name in names} for names, _ in batches]
    assert all(len(of_batch) == 1 for of_batch in sets)
    assert 1430 < sum(of_batch == {"many"} for of_batch in sets) < 1570  # 1500; a standard deviation is 19


def test_going_on_from_any_batch_gives_exactly_what_would_have_come():
    whole = read(3)
    assert whole != read(2)
    for start in range(11):
        assert read(3, start) == whole[start:]
    assert read(3, 4, num_workers=1) == whole[4:]


def test_a_sets_samples_come_equally_often_over_the_runs_epochs():
    """Its own epochs follow each other, wherever the run's end."""
    seen = [name for epoch in range(12) for names, _ in read(epoch) for name in names]
    for name, size in SIZES.items():
        own = [sample for sample in seen if sample.startswith(name)]
        for turn in range(len(own) // size):
            assert len(set(own[turn * size : (turn + 1) * size])) == size
    assert max(collections.Counter(seen).values()) > 5


def test_ranks_draw_alike():
    alone = read(1, batch_size=4)
    both = [read(1, rank=rank, world_size=2) for rank in range(2)]
    together = [sorted(one + other) for (one, _), (other, _) in zip(*both)]
    assert together == [sorted(names) for names, _ in alone]


def test_what_decides_the_order_is_known():
    assert mixture().order == {"readers": None, "grouped": False, "mixture": {"many": 3.0, "few": 1.0}}


@pytest.mark.parametrize("num_batches", [3, 30])
def test_one_set_with_epochs_of_another_length(num_batches):
    plan = SamplePlan(SIZES["few"], 2, seed=1)
    loader = Loader(SampleSource(Named("few"), plan, seed=1))
    cut = Mixture({"all": loader}, {"all": 1.0}, num_batches=num_batches, dataset=Named("few"), seed=0)
    got = []
    for epoch in range(2):
        cut.set_epoch(epoch)
        got += [batch["name"] for batch in cut]
    expected = []
    for epoch in range(20):
        loader.set_epoch(epoch)
        expected += [batch["name"] for batch in loader]
    assert got == expected[: 2 * num_batches]
