"""The demo's data: who is in which split, what is asked, and that luminance says nothing about colour."""

import hashlib
import sys
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from lavis_kvmod.demo import digits


def luminance(picture):
    return np.asarray(picture, dtype=np.float64) @ np.array(digits.LUMA)


def test_splits_share_no_scan_and_leave_none_out():
    members = {split: {scan.index for scan in digits.load_scans(split)} for split in digits.SPLITS}
    assert {split: len(m) for split, m in members.items()} == {"train": 1293, "val": 144, "test": 360}
    assert set().union(*members.values()) == set(range(digits.NUM_SCANS))


def test_the_test_scans_are_always_the_same():
    indices = [scan.index for scan in digits.load_scans("test")]
    digest = hashlib.sha256(",".join(map(str, indices)).encode()).hexdigest()
    assert digest[:16] == "d7a01eb33a7b1857"


def test_scans_and_pictures_are_fixed():
    before = digits.load_scans("val")
    pictures = [np.asarray(digits.render(scan)) for scan in before[:5]]
    digits._all_scans.cache_clear()
    np.random.seed(1)  # nothing is drawn from the global generator
    after = digits.load_scans("val")
    assert after == before
    for scan, picture in zip(after, pictures):
        assert np.array_equal(np.asarray(digits.render(scan)), picture)


def test_the_list_of_scans_is_the_callers_own():
    digits.load_scans("val").clear()
    assert len(digits.load_scans("val")) == 144


def test_a_scan_is_the_handwriting_that_scikit_learn_ships():
    from sklearn.datasets import load_digits

    data = load_digits()
    for scan in digits.load_scans("test")[:20]:
        assert scan.digit == data.target[scan.index]
        assert np.array_equal(np.frombuffer(scan.pixels, np.uint8).reshape(8, 8), data.images[scan.index])


@pytest.mark.parametrize("split", digits.SPLITS)
def test_colours_are_equally_frequent_and_independent_of_the_digit(split):
    scans = digits.load_scans(split)
    pairs = [(scan.ink, scan.paper) for scan in scans]
    counts = [pairs.count(pair) for pair in product(digits.INKS, digits.PAPERS)]
    assert max(counts) - min(counts) <= 1
    assert {scan.digit for scan in scans if scan.ink == "red"} == set(range(10))


@pytest.mark.parametrize("colours, expected", [(digits.INKS, 78), (digits.PAPERS, 206)])
def test_all_inks_and_all_papers_have_exactly_one_luminance(colours, expected):
    for red, green, blue in colours.values():
        assert 299 * red + 587 * green + 114 * blue == 1000 * expected


def test_colour_changes_neither_luminance_nor_its_mean():
    scan = digits.load_scans("val")[0]
    seen = [
        luminance(digits.render(replace(scan, ink=ink, paper=paper)))
        for ink, paper in product(digits.INKS, digits.PAPERS)
    ]
    assert np.ptp(seen, axis=0).max() <= 1.01  # of 255: each channel is rounded up or down
    assert np.ptp([picture.mean() for picture in seen]) < 0.05


def test_no_channel_is_clipped():
    for scan in digits.load_scans("test"):
        picture = np.asarray(digits.render(scan), dtype=int)
        expected = sorted([digits.INKS[scan.ink], digits.PAPERS[scan.paper]])
        low, high = np.min(expected, axis=0), np.max(expected, axis=0)
        assert (picture >= low - 9).all() and (picture <= high + 9).all()


def test_luminance_shifts_from_scan_to_scan():
    shifts = [scan.shift for scan in digits.load_scans("train")]
    assert min(shifts) >= -5 and max(shifts) <= 5 and np.std(shifts) > 2


@pytest.mark.parametrize("size", [56, 112])
def test_a_picture_is_rgb_of_the_size_asked_for(size):
    picture = digits.render(digits.load_scans("val")[0], size)
    assert picture.mode == "RGB" and picture.size == (size, size)


def test_questions_and_caption_of_a_scan():
    scan = digits.Scan(index=12, digit=7, ink="red", paper="yellow")
    assert scan.key == "digits-0012"
    assert digits.caption(scan) == "a red seven on yellow paper"
    assert digits.questions(scan) == [
        digits.Question("digit", "Which digit is written?", "seven"),
        digits.Question("ink", "What colour is the ink?", "red"),
        digits.Question("paper", "What colour is the paper?", "yellow"),
        digits.Question("even", "Is the digit even?", "no"),
    ]
    assert digits.answers(replace(scan, digit=0))["even"] == "yes"


def test_no_answer_fits_two_questions():
    words = [*digits.DIGIT_WORDS, *digits.INKS, *digits.PAPERS, "yes", "no"]
    assert len(set(words)) == len(words)


def test_an_unknown_split_names_the_known_ones():
    with pytest.raises(ValueError, match="train, val, test; got 'dev'"):
        digits.load_scans("dev")


def test_without_scikit_learn_the_remedy_is_named(monkeypatch):
    digits._all_scans.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "lavis-kvmod\[demo\]"'):
        digits.load_scans("test")
