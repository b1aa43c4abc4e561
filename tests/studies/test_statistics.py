"""The intervals hold what they should, and know what is paired."""

import numpy as np
import pytest

from lavis_kvmod.studies.statistics import Values, bootstrap, fit_line


def drawn(rng, seeds=5, images=100, each=4, mean=0.6):
    of_seed, of_image = rng.normal(0, 0.05, (seeds, 1)), rng.normal(0, 0.2, images).repeat(each)
    values = mean + of_seed + of_image + rng.normal(0, 0.3, (seeds, images * each))
    return Values(values, np.arange(images).repeat(each))


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    found = [bootstrap(drawn(rng, seeds=10), resamples=300) for _ in range(100)]
    assert 85 <= sum(interval.low <= 0.6 <= interval.high for interval in found) <= 100
    assert all(interval.low < interval.mean < interval.high for interval in found)


def test_questions_of_an_image_are_drawn_together():
    values = drawn(np.random.default_rng(1), seeds=1)
    together = bootstrap(values)
    apart = bootstrap(values._replace(image=np.arange(values.by_seed.shape[1])))
    assert together.high - together.low > 1.1 * (apart.high - apart.low)
    assert together.sd is None and together == bootstrap(values)


def test_a_paired_difference_is_surer_than_the_two_means():
    rng = np.random.default_rng(2)
    first = drawn(rng)
    second = first._replace(by_seed=first.by_seed + 0.03)
    gain = bootstrap(Values(second.by_seed - first.by_seed, first.image))
    assert gain.tells_apart and gain.mean == pytest.approx(0.03)
    assert bootstrap(first).high > bootstrap(second).low  # side by side they could be equal
    assert not bootstrap(Values(np.zeros((2, 400)), first.image)).tells_apart
    with pytest.raises(ValueError, match="one seed and one question at least"):
        bootstrap(Values(np.zeros((0, 4)), np.arange(4)))


def test_a_line_through_doses():
    line = fit_line([0, 50, 100], [10, 5, 0])
    assert line == pytest.approx((-0.1, 10, 1))
    assert fit_line([1, 1], [2, 3]) is None
