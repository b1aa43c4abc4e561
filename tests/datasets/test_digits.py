"""`digits_vqa` and `digits_caption` give what LAVIS's loaders, tasks and models expect."""

import pytest
import torch
from lavis.processors.blip_processors import BlipImageEvalProcessor, BlipImageTrainProcessor
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from lavis_kvmod.datasets.digits import DigitsCaptionBuilder, DigitsVQABuilder
from lavis_kvmod.demo import digits


@pytest.fixture(scope="module")
def vqa():
    return DigitsVQABuilder().build_datasets()


@pytest.fixture(scope="module")
def captions():
    return DigitsCaptionBuilder().build_datasets()


def batch(dataset, size=8):
    return next(iter(DataLoader(dataset, batch_size=size, collate_fn=dataset.collater)))


def test_four_questions_for_each_scan(vqa):
    assert {split: len(dataset) for split, dataset in vqa.items()} == {"train": 5172, "val": 576, "test": 1440}


def test_one_caption_for_each_scan(captions):
    assert {split: len(dataset) for split, dataset in captions.items()} == {"train": 1293, "val": 144, "test": 360}


def test_a_training_batch_is_lavis_vqa_batch_with_keys(vqa):
    got = batch(vqa["train"])
    assert set(got) == {"image", "text_input", "answer", "weight", "n_answers", "image_key"}
    assert got["image"].shape == (8, 3, 56, 56) and got["image"].dtype == torch.float32
    assert got["weight"].tolist() == [1.0] * 8 and got["n_answers"].tolist() == [1] * 8
    scan = digits.load_scans("train")[0]
    assert got["answer"][:4] == [q.answer for q in digits.questions(scan)]
    assert got["text_input"][:2] == ["which digit is written?", "what colour is the ink?"]
    assert got["image_key"][:5] == [scan.key] * 4 + [digits.load_scans("train")[1].key]


def test_an_evaluation_batch_names_question_and_instance(vqa):
    got = batch(vqa["test"])
    targets = {"answer", "weight", "n_answers"}
    assert set(got) == {"image", "text_input", "question_id", "instance_id", "image_key"} | targets
    assert got["answer"][:4] == [q.answer for q in digits.questions(digits.load_scans("test")[0])]
    index = digits.load_scans("test")[0].index
    assert got["question_id"][:4] == [f"{index:04d}-{kind}" for kind in ("digit", "ink", "paper", "even")]
    assert got["instance_id"] == [str(i) for i in range(8)]


def test_the_annotation_holds_the_ground_truth(vqa):
    scan = digits.load_scans("val")[3]
    entry = vqa["val"].annotation[13]
    assert {key: entry[key] for key in ("image_id", "question_id", "question_type", "instance_id")} == {
        "image_id": f"{scan.index:04d}",
        "question_id": f"{scan.index:04d}-ink",
        "question_type": "ink",
        "instance_id": "13",
    }
    assert entry["question"] == "What colour is the ink?" and entry["answer"] == [scan.ink]


def test_question_ids_are_unique_over_all_splits(vqa):
    ids = [entry["question_id"] for dataset in vqa.values() for entry in dataset.annotation]
    assert len(set(ids)) == len(ids) == 4 * digits.NUM_SCANS


def test_every_answer_is_in_the_answer_list(vqa):
    for split in ("val", "test"):
        assert {a for e in vqa[split].annotation for a in e["answer"]} == set(vqa[split].answer_list)


def test_caption_batches(captions):
    train, test = batch(captions["train"], 3), batch(captions["test"], 3)
    assert set(train) == {"image", "text_input", "image_id", "image_key"}
    assert set(test) == {"image", "text_input", "image_id", "instance_id", "image_key"}
    scans = digits.load_scans("train")[:3]
    assert train["text_input"] == [digits.caption(scan) for scan in scans]
    assert train["image_id"] == [f"{scan.index:04d}" for scan in scans]
    assert captions["test"].annotation[0]["caption"] == [digits.caption(digits.load_scans("test")[0])]
    assert all(isinstance(i, str) for i in test["image_id"] + test["instance_id"])


def test_the_picture_is_the_scans(vqa, captions):
    scan = digits.load_scans("test")[5]
    expected = BlipImageEvalProcessor(56)(digits.render(scan))
    assert torch.equal(captions["test"][5]["image"], expected)
    assert torch.equal(vqa["test"][5 * 4 + 2]["image"], expected)


def test_equal_keys_mean_equal_pixels(vqa, captions):
    seen = {}
    for dataset in (vqa["val"], captions["val"]):
        for i in range(0, 40):
            sample = dataset[i]
            assert torch.equal(seen.setdefault(sample["image_key"], sample["image"]), sample["image"])


def test_with_random_crops_there_is_no_key(vqa):
    dataset = DigitsVQABuilder().build_datasets()["train"]
    dataset.set_processors(BlipImageTrainProcessor(56), dataset.text_processor)
    assert "image_key" not in dataset[0]
    assert set(batch(dataset)) == {"image", "text_input", "answer", "weight", "n_answers"}


@pytest.mark.parametrize("builder, name", [(DigitsVQABuilder, "digits_vqa"), (DigitsCaptionBuilder, "digits_caption")])
def test_the_configuration_has_lavis_layout(builder, name):
    config = OmegaConf.load(builder.default_config_path()).datasets
    assert list(config) == [name]
    assert config[name].data_type == "images" and "build_info" in config[name]
    assert config[name].vis_processor.train == config[name].vis_processor.eval


def test_an_unknown_type_names_the_known_ones():
    with pytest.raises(ValueError, match="DigitsVQABuilder: expected a type of default; got 'full'"):
        DigitsVQABuilder.default_config_path("full")


def test_a_run_file_may_change_the_processors():
    config = OmegaConf.load(DigitsVQABuilder.default_config_path()).datasets.digits_vqa
    config.vis_processor.eval.image_size = 28
    assert DigitsVQABuilder(config).build_datasets()["val"][0]["image"].shape == (3, 28, 28)


def test_a_share_of_captions_can_be_exchanged():
    scans = digits.load_scans("train")
    right = [digits.caption(scan) for scan in scans]
    told = digits.captions(scans, 0.3)
    wrong = [i for i, (a, b) in enumerate(zip(told, right)) if a != b]
    assert (
        len(wrong) == round(0.3 * len(scans))
        and told == digits.captions(scans, 0.3)
        and digits.captions(scans) == right
    )
    assert {told[i] for i in wrong} <= set(right)  # texts of the same kind, of other scans
    section = OmegaConf.load(DigitsCaptionBuilder.default_config_path()).datasets.digits_caption
    section.build_info.wrong_captions = {"train": 0.3}
    built = DigitsCaptionBuilder(section).build()
    assert [row["caption"][0] for row in built["train"].annotation] == told
    assert [row["caption"][0] for row in built["test"].annotation] == [
        digits.caption(s) for s in digits.load_scans("test")
    ]
    section.build_info.wrong_captions = {"train": 3, "nope": 0.1}
    assert len(DigitsCaptionBuilder.config_problems(section)) == 2


def test_few_scans_are_trained_on_and_all_are_asked_about():
    config = OmegaConf.load(DigitsCaptionBuilder.default_config_path()).datasets.digits_caption
    config.update(train_scans=50, build_info={"wrong_captions": {"train": 0.3}})
    few = DigitsCaptionBuilder(config).build_datasets()
    assert [len(few[split]) for split in digits.SPLITS] == [50, 144, 360]
    shown = [digits.caption(scan) for scan in digits.load_scans("train")[:50]]
    told = [entry["caption"][0] for entry in few["train"].annotation]
    assert sum(a != b for a, b in zip(told, shown)) == 15  # of these 50, and among them
    config.train_scans = 5000
    (problem,) = DigitsCaptionBuilder.config_problems(config)
    assert problem.startswith("train_scans: ") and "at most 1293" in problem
