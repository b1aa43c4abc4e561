"""An image's questions come together, each once an epoch, and the image once a batch."""

import collections

import pytest
import torch
from lavis.datasets.datasets.base_dataset import ConcatDataset
from lavis.processors.blip_processors import BlipImageEvalProcessor, BlipImageTrainProcessor, BlipQuestionProcessor
from PIL import Image

from lavis_kvmod.datasets.annotated import VQAEvalData, VQATrainData
from lavis_kvmod.datasets.loading import images
from lavis_kvmod.datasets.loading.loader import PADDING, Loader
from lavis_kvmod.datasets.loading.plans import SamplePlan
from lavis_kvmod.datasets.loading.samples import SampleSource

QUESTIONS = (3, 1, 5, 2, 4, 1, 5)  # of each image


@pytest.fixture(scope="module")
def annotations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rows = []
    for n, count in enumerate(QUESTIONS):
        path = folder / f"{n}.png"
        Image.effect_noise((40, 30), 60 + n).convert("RGB").save(path)
        row = {"image": str(path), "image_id": n, "source": f"row {n}", "answer": ["a"]}
        rows += [{**row, "question": f"{n} {q}?", "question_id": f"{n}-{q}"} for q in range(count)]
    return rows[::2] + rows[1::2]  # not in order


def train_data(annotations, processor=BlipImageTrainProcessor):
    return VQATrainData(processor(16), BlipQuestionProcessor(), annotations)


def batches(dataset, batch_size, epoch=2, start=0, num_workers=0, seed=5, **ranks):
    plan = SamplePlan(len(dataset), batch_size, seed=seed, images=images.first_with_same_image(dataset), **ranks)
    loader = Loader(SampleSource(dataset, plan, seed=7), num_workers=num_workers)
    loader.set_epoch(epoch, start)
    return list(loader)


def seen(of_batches):
    """Question -> its image."""
    return {
        question: batch["image"][index]
        for batch in of_batches
        for question, index in zip(batch["text_input"], batch["image_index"])
    }


def of_image(batch):
    return [question.split()[0] for question in batch["text_input"]]


def equal(one, other):
    assert list(one) == list(other)
    return all(torch.equal(one[key], other[key]) for key in one)


def test_a_batch_has_each_of_its_images_once(annotations):
    dataset = train_data(annotations)
    whole = batches(dataset, 6)
    assert [len(batch["text_input"]) for batch in whole] == [6, 6, 6, 3]
    for batch in whole:
        assert len(batch["image"]) == len(set(of_image(batch)))
        assert collections.Counter(batch["image_index"].tolist()) == {
            list(dict.fromkeys(of_image(batch))).index(name): count
            for name, count in collections.Counter(of_image(batch)).items()
        }
    assert len(seen(whole)) == len(annotations)
    in_a_row = [name for batch in whole for name in of_image(batch)]
    assert sum(a != b for a, b in zip(in_a_row, in_a_row[1:])) == len(QUESTIONS) - 1
    assert in_a_row != [name for batch in batches(dataset, 6, epoch=3) for name in of_image(batch)]


def test_every_image_is_as_likely_in_every_place(annotations):
    """However many questions it has."""
    dataset = train_data(annotations)
    plan = SamplePlan(len(dataset), 1, seed=0, images=images.first_with_same_image(dataset))
    first = collections.Counter(annotations[plan.epoch(epoch).batch(0).samples[0]]["image_id"] for epoch in range(1400))
    assert all(140 < first[n] < 260 for n in range(len(QUESTIONS)))  # 200 each; a standard deviation is 13


def test_views_hang_on_seed_epoch_and_image_alone(annotations):
    """Not on the batch's other samples, nor on who reads it: an image that two batches or ranks share is in both."""
    dataset = train_data(annotations)
    alone = seen(batches(dataset, 6))
    by_image = collections.defaultdict(list)
    for question, image in alone.items():
        by_image[question.split()[0]].append(image)
    assert all(torch.equal(first, other) for first, *others in by_image.values() for other in others)
    assert equal(dict(sorted(seen(batches(dataset, 1)).items())), dict(sorted(alone.items())))
    assert equal(seen(batches(dataset, 6, num_workers=2)), alone)
    assert equal(seen(batches(dataset, 6, start=2)), seen(batches(dataset, 6)[2:]))
    later = seen(batches(dataset, 6, epoch=3))
    assert sum(torch.equal(later[question], image) for question, image in alone.items()) < len(alone) / 2


@pytest.mark.parametrize("world_size, batch_size", [(2, 3), (3, 2), (4, 5)])
def test_ranks_together_have_what_one_process_has(annotations, world_size, batch_size):
    dataset = train_data(annotations)
    whole = batches(dataset, batch_size * world_size)
    of_ranks = [batches(dataset, batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(of_rank) for of_rank in of_ranks} == {len(whole)}
    for step, together in zip(zip(*of_ranks), whole):
        parts = [batch for batch in step if PADDING not in batch]
        assert [question for batch in parts for question in batch["text_input"]] == together["text_input"]
        assert equal(seen(parts), seen([together]))


def test_an_evaluation_groups_too(annotations):
    dataset = VQAEvalData(BlipImageEvalProcessor(16), BlipQuestionProcessor(), annotations)
    of_ranks = [batches(dataset, 4, seed=None, rank=rank, world_size=2) for rank in range(2)]
    ids = [instance for of_rank in of_ranks for batch in of_rank for instance in batch["instance_id"]]
    assert sorted(ids, key=int) == [str(n) for n in range(len(annotations))]
    first = of_ranks[0][0]
    assert len(first["image_key"]) == len(first["image"]) == len(set(of_image(first))) < 4
    for question, key in zip(first["text_input"], [first["image_key"][i] for i in first["image_index"]]):
        assert key.endswith(f"{question.split()[0]}.png")


def test_without_two_samples_of_an_image_nothing_changes(annotations):
    dataset = train_data([row for row in annotations if row["question_id"].endswith("-0")])
    assert images.first_with_same_image(dataset) is None


def test_concatenated_sets_keep_their_own_views(annotations):
    """The same file through two processors is two images; a set that cannot tell has an image for each sample."""

    class CannotTell(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return {**plain[index], "text_input": f"other {index}?"}

    plain, cropped = train_data(annotations, BlipImageEvalProcessor), train_data(annotations)
    dataset = ConcatDataset([plain, cropped, CannotTell()])
    first = images.first_with_same_image(dataset)
    size = len(annotations)
    assert len(set(first[:size])) == len(set(first[size : 2 * size])) == len(QUESTIONS)
    assert first[-2:].tolist() == [2 * size, 2 * size + 1]
    (batch,) = batches(dataset, 100)
    assert len(batch["image"]) == 2 * len(QUESTIONS) + 2 and len(batch["text_input"]) == 2 * size + 2


def test_what_stands_in_for_a_bad_image_is_nobody_elses_view(annotations, tmp_path):
    from lavis_kvmod.datasets.bad_samples import BadSamplePolicy

    (tmp_path / "bad.png").write_bytes(b"no picture")
    rows = [{**annotations[0], "image": str(tmp_path / "bad.png")}, *annotations[1:]]
    dataset = VQATrainData(
        BlipImageTrainProcessor(16), BlipQuestionProcessor(), rows, policy=BadSamplePolicy("skip", 0.5)
    )
    (batch,) = batches(dataset, 100)
    assert len(batch["text_input"]) == len(rows) and len(batch["bad_samples"]) == 1
    assert len(batch["image"]) == len({row["image"] for row in rows})
