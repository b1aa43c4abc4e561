"""`digits_pages`: pages of several digits, whose questions say what they need."""

from collections import Counter

import numpy as np
import pytest
import torch
from lavis.common.registry import registry
from torch.utils.data import DataLoader

from lavis_kvmod.datasets.digits_pages import DigitsPagesBuilder
from lavis_kvmod.demo import digits, pages
from lavis_kvmod.demo.pages import PageSettings

SETTINGS = PageSettings()


@pytest.fixture(scope="module")
def datasets():
    return DigitsPagesBuilder().build_datasets()


def scans_on(found):
    return {one.scan.index for page in found for one in page.written}


def test_lavis_knows_the_builder_and_no_scan_is_in_two_splits(datasets):
    assert registry.get_builder_class("digits_pages") is DigitsPagesBuilder
    assert {split: len(dataset.scans) for split, dataset in datasets.items()} == {
        "train": 1293,
        "val": 144,
        "test": 360,
    }
    for split, dataset in datasets.items():
        assert scans_on(dataset.scans) <= {scan.index for scan in digits.load_scans(split)}
    assert len({page.key for dataset in datasets.values() for page in dataset.scans}) == 1797


@pytest.mark.parametrize("count, page_size", [(2, 56), (3, 84), (4, 224)])
def test_every_answer_follows_from_what_is_written(count, page_size):
    settings = PageSettings(digits_a_page=count, page_size=page_size)
    for page in pages.load_pages("val", settings):
        written = page.written
        assert len({one.scan.digit for one in written}) == len({one.column for one in written}) == count
        assert [one.column for one in written] == sorted(one.column for one in written)
        known = {question.type: question for question in pages.questions(page)}
        assert known["on the left"].answer == written[0].word and known["paper"].answer == page.paper
        (one,) = [one for one in written if one.word in known["ink of digit"].question]
        assert known["ink of digit"].answer == one.ink
        counted = known["how many"].question[len("How many are ") : -1]
        assert known["how many"].answer == digits.DIGIT_WORDS[[one.ink for one in written].count(counted)]
        assert known["one line"].answer == ("yes" if len({one.row for one in written}) == 1 else "no")
        if "left of ink" in known:
            places = [i for i, one in enumerate(written) if f" {one.ink} " in known["left of ink"].question]
            assert len(places) == 1 and known["left of ink"].answer == written[places[0] - 1].word
        assert all(one.word in pages.description(page) and one.ink in pages.description(page) for one in written)


def test_no_kind_of_question_is_answered_by_its_commonest_answer(datasets):
    found = {}
    for row in datasets["train"].annotation:
        found.setdefault(row["question_type"], Counter())[row["answer"][0]] += 1
        assert row["answer_type"] == pages.NEEDS[row["question_type"]]
    assert set(found) == set(pages.NEEDS)
    share = {kind: max(answers.values()) / sum(answers.values()) for kind, answers in found.items()}
    assert share.pop("one line") < 0.53 and share.pop("how many") < 0.52
    assert max(share.values()) < 0.3


def test_pages_are_fixed_and_luminance_tells_no_ink():
    before = pages.load_pages("test", SETTINGS)[:3]
    pictures = [np.asarray(pages.render(page)) for page in before]
    pages._pages.cache_clear()
    after = pages.load_pages("test", SETTINGS)[:3]
    assert after == before
    for page, picture in zip(after, pictures):
        assert np.array_equal(np.asarray(pages.render(page)), picture) and picture.shape == (56, 56, 3)
        luminance = picture.astype(float) @ np.array(digits.LUMA)
        by_ink = [luminance[one.row * 28 :, one.column * 28 :][:28, :28].min() for one in page.written]
        assert np.ptp(by_ink) < 8  # noise of two fully inked pixels, where the colours' own luminances differ by 50


def test_few_labels_and_an_ink_that_its_paper_never_had():
    few = PageSettings(train_scans=25)
    assert len(pages.load_pages("train", few)) <= 25
    assert scans_on(pages.load_pages("train", few)) <= {scan.index for scan in digits.load_scans("train")[:25]}
    assert pages.load_pages("test", few) == pages.load_pages("test", SETTINGS)
    shifted = PageSettings(shift="ink_on_paper")
    seen, new = (
        {(page.paper, one.ink) for page in pages.load_pages(split, shifted) for one in page.written}
        for split in ("train", "test")
    )
    assert not seen & new and len(seen) == 16 and len(new) == 8
    assert {ink for _, ink in seen} == set(digits.INKS)


def test_a_batch_is_that_of_digits_vqa(datasets):
    for split, extra in (("train", set()), ("test", {"question_id", "instance_id"})):
        dataset = datasets[split]
        got = next(iter(DataLoader(dataset, batch_size=6, collate_fn=dataset.collater)))
        assert set(got) == {"image", "text_input", "answer", "weight", "n_answers", "image_key"} | extra
        assert got["image"].shape == (6, 3, 56, 56) and got["image"].dtype == torch.float32
    ids = [row["question_id"] for dataset in datasets.values() for row in dataset.annotation]
    assert len(set(ids)) == len(ids)


def test_what_is_wrong_with_a_section_is_told_together(section_of):
    section = section_of(DigitsPagesBuilder)
    assert DigitsPagesBuilder.config_problems(section) == []
    section.update(digits_a_page=3, shift="paper", trian_scans=25)
    problems = DigitsPagesBuilder.config_problems(section)
    assert [problem.split(";")[0] for problem in problems] == [
        "trian_scans: unknown key",
        "shift: expected one of none, ink_on_paper",
        "digits_a_page: 3 digits of 28 pixels do not fit side by side on a page of 56",
    ]
    assert "did you mean train_scans?" in problems[0]
