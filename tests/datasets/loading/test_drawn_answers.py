"""Which answer a question is trained on: drawn under seed, epoch and sample, whoever reads it in whatever batch."""

import torch
from torch.utils.data import Dataset

from lavis_kvmod.datasets.loading.loader import Loader
from lavis_kvmod.datasets.loading.plans import SamplePlan
from lavis_kvmod.datasets.loading.samples import SampleSource
from lavis_kvmod.models.language.answers import answers_of

SAMPLES = 400


class Template(Dataset):
    """One question about many images: 6 of 10 people said yes, 4 no."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return index

    def collater(self, samples):
        return {
            "text_input": ["is it art"] * len(samples),
            "answer": ["yes", "no"] * len(samples),
            "weight": torch.tensor([0.6, 0.4] * len(samples)),
            "n_answers": torch.tensor([2] * len(samples)),
            "index": samples,
        }


def drawn(seed=0, epoch=0, batch_size=16, world_size=1):
    """The answer of each sample."""
    found = {}
    for rank in range(world_size):
        plan = SamplePlan(SAMPLES, batch_size=batch_size, rank=rank, world_size=world_size, seed=seed)
        loader = Loader(SampleSource(Template(), plan, seed))
        loader.set_epoch(epoch)
        for batch in loader:
            found.update(zip(batch["index"], answers_of(batch, draw=True).answers))
    return [found[index] for index in range(SAMPLES)]


def test_a_template_question_sees_all_its_answers_in_every_epoch():
    for epoch in range(2):
        assert abs(drawn(epoch=epoch).count("yes") / SAMPLES - 0.6) < 0.08


def test_the_draw_follows_seed_and_epoch_alone():
    answers = drawn()
    assert answers == drawn(batch_size=7) == drawn(world_size=3)
    assert answers != drawn(seed=1) and answers != drawn(epoch=1) != drawn(seed=1)
