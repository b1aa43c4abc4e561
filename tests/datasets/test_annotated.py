"""Batches of annotated images, as LAVIS's loaders, tasks and models expect them."""

import pytest
import torch
from lavis.datasets.data_utils import concat_datasets, prepare_sample
from lavis.datasets.datasets.caption_datasets import CaptionDataset
from lavis.datasets.datasets.vqa_datasets import VQADataset
from lavis.processors.blip_processors import BlipCaptionProcessor, BlipImageEvalProcessor, BlipQuestionProcessor
from torch.utils.data import DataLoader

from lavis_kvmod.datasets.annotated import (
    CaptionEvalData,
    CaptionTrainData,
    VQAEvalData,
    VQATrainData,
    answers_and_weights,
    collate,
    pixel_key,
)
from lavis_kvmod.datasets.bad_samples import BadSamplePolicy

CAT, ROCKET = "chelsea.png", "rocket.jpg"


def annotations(photos, names=(CAT, ROCKET)):
    return [
        {
            "image": str(photos / name),
            "image_id": name,
            "source": f"qa.csv, row {row}",
            "question": f"Is it a cat, {row}?",
            "question_id": row,
            "answer": ["yes", "yes", "no"],
            "caption": ["A cat.", "An animal"],
        }
        for row, name in enumerate(names, start=2)
    ]


def questions(cls, photos, **options):
    return cls(BlipImageEvalProcessor(28), BlipQuestionProcessor(), annotations(photos), **options)


def captions(cls, photos):
    return cls(BlipImageEvalProcessor(28), BlipCaptionProcessor(), annotations(photos))


def batch(dataset, size=2):
    return next(iter(DataLoader(dataset, batch_size=size, collate_fn=dataset.collater)))


def test_they_are_lavis_data_sets(photos):
    assert isinstance(questions(VQATrainData, photos), VQADataset)
    assert isinstance(captions(CaptionTrainData, photos), CaptionDataset)


def test_the_training_batch_equals_that_of_lavis_collater(photos):
    data = questions(VQATrainData, photos)
    samples = [data[0], data[1]]
    ours, theirs = data.collater(samples), VQADataset.collater(data, samples)
    assert set(theirs) == set(ours) - {"image_key"}
    for key, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(ours[key], value) and ours[key].dtype == value.dtype, key
        else:
            assert ours[key] == value, key


def test_answers_weigh_as_in_lavis():
    assert answers_and_weights({"answer": ["a", "b", "a", "a"]}) == (["a", "b"], [0.75, 0.25])
    assert answers_and_weights({"answer": ["a", "b", "a"], "weight": [1, 0.5, 2]}) == (["a", "b"], [3.0, 0.5])


@pytest.mark.parametrize("cls", [VQATrainData, VQAEvalData])
def test_whoever_said_nothing_is_left_out_with_his_weight(photos, cls):
    data = questions(cls, photos)
    said = {"answer": ["yes", "", " ", "no"]}
    assert answers_and_weights(said) == (["yes", "no"], [0.25, 0.25])
    assert answers_and_weights({**said, "weight": [0.5, 0.3, 0.1, 0.1]}) == (["yes", "no"], [0.5, 0.1])
    sample = data._texts({**data.annotation[0], **said, "weight": [0.5, 0.3, 0.1, 0.1]})
    assert sample["answers"] == ["yes", "no"] and sample["weights"] == [0.5, 0.1]


def test_instances_are_numbered_as_in_lavis(photos):
    data = questions(VQAEvalData, photos)
    assert [entry["instance_id"] for entry in data.annotation] == ["0", "1"]
    got = batch(data)
    assert got["instance_id"] == ["0", "1"] and got["question_id"].tolist() == [2, 3]


def test_evaluation_batches_carry_targets_where_all_have_them(photos):
    data = questions(VQAEvalData, photos)
    got = batch(data)
    assert got["answer"] == ["yes", "no"] * 2 and got["n_answers"].tolist() == [2, 2]
    assert got["weight"].tolist() == pytest.approx([2 / 3, 1 / 3] * 2)
    data.annotation[1] = {**data.annotation[1], "answer": []}
    assert not {"answer", "weight", "n_answers"} & set(batch(data))
    got = batch(captions(CaptionEvalData, photos))
    assert got["text_input"] == ["a cat", "a cat"] and got["image_id"] == [CAT, ROCKET]


def test_texts_go_through_the_processor_and_answers_do_not(photos):
    data = questions(VQATrainData, photos)
    data.annotation[0] = {**data.annotation[0], "answer": ["St. Peter's (Rome)"]}
    assert (data[0]["text_input"], data[0]["answers"]) == ("is it a cat, 2?", ["St. Peter's (Rome)"])


@pytest.mark.parametrize(
    "ids, as_tensor",
    [([1, 2], True), ([1, "2"], False), ([1.5, 2], False), ([True, 2], False), ([2**63, 1], False), ([-1, 0], True)],
)
def test_ids_are_a_tensor_only_where_that_changes_none(ids, as_tensor):
    got = collate([{"image": torch.zeros(1), "question_id": value} for value in ids])["question_id"]
    assert (got.tolist() if as_tensor else got) == ids and isinstance(got, torch.Tensor) == as_tensor


def test_processors_are_told_apart_by_what_they_do():
    same = [pixel_key(BlipImageEvalProcessor(28)) for _ in range(2)]
    others = [pixel_key(BlipImageEvalProcessor(56)), pixel_key(BlipImageEvalProcessor(28, mean=(0, 0, 0)))]
    assert same[0] == same[1] and len({*same, *others}) == 3

    class Random(BlipImageEvalProcessor):
        """Nobody knows what a subclass does."""

    assert pixel_key(Random(28)) is None and pixel_key(lambda image: image) is None


def test_bad_samples_survive_lavis_concatenation(photos):
    """LAVIS concatenates training sets, and drops every key that not all samples have."""
    (photos / CAT).write_bytes(b"")
    policy = BadSamplePolicy("skip", 0.5)
    both = concat_datasets({"train": [questions(VQATrainData, photos, policy=policy) for _ in range(2)]})["train"]
    got = batch(both, 4)
    assert [text.split(": ")[0] for text in got["bad_samples"]] == ["qa.csv, row 2"] * 2
    assert got["n_answers"].tolist() == [2] * 4
    assert prepare_sample(got, cuda_enabled=False)["bad_samples"] == got["bad_samples"]
