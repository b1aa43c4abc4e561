"""Means with intervals over seeds and images, and paired differences between arms.

Two things vary: what a training starts from and the order it sees (the seed), and which images it is asked about. Both
are drawn again, seeds and images independently of each other, an image always with all of its questions; arms are
compared on the same draw, since they share seeds and images (B. Efron, "Bootstrap methods", Annals of Statistics 1979;
for two crossed factors: A. Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 2007).
`scipy.stats.bootstrap` draws from one factor alone.
"""

from typing import NamedTuple, Optional, Sequence

import numpy as np

__all__ = ["Interval", "Line", "Values", "bootstrap", "fit_line"]


class Values(NamedTuple):
    """A number for each seed and question (s, n), and the image that each question is about (n,), as 0 … images - 1."""

    by_seed: np.ndarray
    image: np.ndarray


class Interval(NamedTuple):
    """A mean, its bootstrap interval, and the standard deviation over seeds (None for one seed)."""

    mean: float
    low: float
    high: float
    sd: Optional[float]

    @property
    def tells_apart(self) -> bool:
        """For a difference: whether 0 is outside."""
        return self.low > 0 or self.high < 0


class Line(NamedTuple):
    """A least-squares line: slope, value at 0, and the share of the variance that it explains (R²)."""

    slope: float
    at_zero: float
    r_squared: float


def bootstrap(values: Values, resamples: int = 2000, confidence: float = 0.95, seed: int = 0) -> Interval:
    """The mean over seeds and questions, with its percentile interval.

    Raises:
        ValueError: if there is nothing to take a mean of.
    """
    seeds, questions = values.by_seed.shape
    if not seeds or not questions:
        raise ValueError(f"expected values of one seed and one question at least, got {values.by_seed.shape}")
    images = int(values.image.max()) + 1
    sums = np.stack([np.bincount(values.image, weights=of_seed, minlength=images) for of_seed in values.by_seed])
    counts = np.bincount(values.image, minlength=images)
    rng = np.random.default_rng(seed)
    drawn_seeds = rng.multinomial(seeds, [1 / seeds] * seeds, size=resamples)  # (r, s)
    present = np.flatnonzero(counts)
    drawn = rng.multinomial(len(present), [1 / len(present)] * len(present), size=resamples)  # (r, i)
    totals = np.einsum("rs,si,ri->r", drawn_seeds, sums[:, present], drawn) / seeds
    means = totals / np.maximum(drawn @ counts[present], 1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    sd = float(values.by_seed.mean(1).std(ddof=1)) if seeds > 1 else None
    return Interval(float(values.by_seed.mean()), float(low), float(high), sd)


def fit_line(x: Sequence[float], y: Sequence[float]) -> Optional[Line]:
    """The line through points; None where they do not determine one."""
    if len(set(x)) < 2:
        return None
    slope, at_zero = np.polyfit(x, y, 1)
    left = np.asarray(y) - (slope * np.asarray(x) + at_zero)
    whole = np.asarray(y) - np.mean(y)
    r_squared = 1 - float(left @ left) / float(whole @ whole) if float(whole @ whole) else 1.0
    return Line(float(slope), float(at_zero), r_squared)
