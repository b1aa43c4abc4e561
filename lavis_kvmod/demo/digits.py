"""scikit-learn's 1,797 scanned digits, inked in colours on coloured paper, with four questions each.

Shape and colour are kept apart on purpose. All inks have the same luminance, and so have all papers: an encoder that
sees luminance reads the digit and cannot know a colour. Split, colours and noise are fixed by seed and by scan.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI machine learning repository (its test
part, which scikit-learn ships).
"""

from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from typing import Dict, List, Sequence, Tuple

import numpy as np
from PIL import Image

__all__ = [
    "DIGIT_WORDS",
    "INKS",
    "INK_LUMINANCE",
    "LUMA",
    "MAX_SHIFT",
    "NUM_SCANS",
    "PAPERS",
    "PAPER_LUMINANCE",
    "QUESTIONS",
    "SPLITS",
    "Question",
    "Scan",
    "answers",
    "caption",
    "captions",
    "coverage",
    "grained",
    "load_scans",
    "questions",
    "render",
]

LUMA = (0.299, 0.587, 0.114)  # weights of R, G, B in the luminance, after ITU-R BT.601
INK_LUMINANCE = 78
PAPER_LUMINANCE = 206

# Integer solutions of 299 R + 587 G + 114 B = 1000 luminance, near the colour that the name promises. Each channel
# leaves room for `MAX_SHIFT` and `_MAX_GRAIN`: a clipped channel would change the luminance of some colours only.
INKS: Dict[str, Tuple[int, int, int]] = {
    "red": (231, 9, 32),
    "green": (14, 124, 9),
    "blue": (8, 82, 241),
    "purple": (150, 12, 229),
    "brown": (130, 62, 24),
    "grey": (78, 78, 78),
}
PAPERS: Dict[str, Tuple[int, int, int]] = {
    "white": (206, 206, 206),
    "yellow": (246, 220, 29),
    "pink": (236, 188, 220),
    "sky": (124, 240, 246),
}
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUESTIONS: Dict[str, str] = {
    "digit": "Which digit is written?",
    "ink": "What colour is the ink?",
    "paper": "What colour is the paper?",
    "even": "Is the digit even?",
}

NUM_SCANS = 1797
SPLITS: Dict[str, int] = {"train": 1293, "val": 144, "test": 360}

_SEED = 2301  # of everything that is drawn here
_RESOLUTION = 8  # pixels a side, as scanned
_LEVELS = 16  # ink levels of a scanned pixel: 0 … 16
_INK_GAIN = 1.6  # a stroke's core is fully inked; its edge stays soft
MAX_SHIFT = 5.0  # of a scan's luminance
_MAX_GRAIN = 2.5  # of a pixel's luminance


@dataclass(frozen=True)
class Scan:
    """One handwritten digit and the colours it is shown in.

    Attributes:
        index: its place in scikit-learn's data set, 0 … 1796.
        digit: 0 … 9.
        ink, paper: names in `INKS` and `PAPERS`.
        shift: of the luminance of the whole picture, in 8-bit levels.
        pixels: 8×8 ink levels 0 … 16, row by row.
    """

    index: int
    digit: int
    ink: str
    paper: str
    shift: float = 0.0
    pixels: bytes = field(default=b"", repr=False)

    @property
    def key(self) -> str:
        """A name that is the scan's own, such as ``digits-0012``."""
        return f"digits-{self.index:04d}"


@dataclass(frozen=True)
class Question:
    """One question of a `QUESTIONS` type about a scan, and its answer in lower case."""

    type: str
    question: str
    answer: str


def load_scans(split: str) -> List[Scan]:
    """The scans of ``train`` (1,293), ``val`` (144) or ``test`` (360).

    Nothing that is trained sees a test scan, the demo's ViT included. Within a split every ink and every paper is
    equally frequent (give or take one), so chance is 1/6 and 1/4.

    Raises:
        ValueError: for another split.
        ImportError: without scikit-learn.
    """
    if split not in SPLITS:
        raise ValueError(f"expected a split of {', '.join(SPLITS)}; got {split!r}")
    return list(_all_scans()[split])


def questions(scan: Scan) -> List[Question]:
    """One question of each type, in the order of `QUESTIONS`."""
    known = answers(scan)
    return [Question(kind, text, known[kind]) for kind, text in QUESTIONS.items()]


def answers(scan: Scan) -> Dict[str, str]:
    """The answer to each question type, such as ``seven``, ``red``, ``yellow``, ``no``."""
    return {
        "digit": DIGIT_WORDS[scan.digit],
        "ink": scan.ink,
        "paper": scan.paper,
        "even": "yes" if scan.digit % 2 == 0 else "no",
    }


def caption(scan: Scan) -> str:
    """What the picture shows: ``a red seven on yellow paper``."""
    return f"a {scan.ink} {DIGIT_WORDS[scan.digit]} on {scan.paper} paper"


def captions(scans: Sequence[Scan], wrong: float = 0.0) -> List[str]:
    """What each picture shows; of a share ``wrong`` of them, drawn by seed, what another one of these shows."""
    right = [caption(scan) for scan in scans]
    chosen = np.random.default_rng((_SEED, len(scans))).permutation(len(scans))[: round(wrong * len(scans))].tolist()
    told = list(right)
    for place, i in enumerate(chosen):
        others = (right[j] for j in chosen[place + 1 :] + chosen[:place])
        told[i] = next((other for other in others if other != right[i]), right[i])
    return told


def coverage(scan: Scan, size: int = 56) -> np.ndarray:
    """How much of each pixel is ink: (size, size), float32, 0 … 1."""
    levels = np.frombuffer(scan.pixels, np.uint8).reshape(_RESOLUTION, _RESOLUTION)
    scanned = Image.fromarray(levels.astype(np.float32) / _LEVELS)
    enlarged = np.asarray(scanned.resize((size, size), Image.Resampling.BICUBIC))
    return np.clip(enlarged * _INK_GAIN, 0.0, 1.0)


def render(scan: Scan, size: int = 56) -> Image.Image:
    """The scan in its colours: an RGB picture of ``size``×``size`` pixels, always the same one.

    Its luminance is the same whatever the colours, up to rounding. So that the rounding says nothing either, the
    luminance is shifted by scan, grained by pixel, and rounded up or down at random.
    """
    rng = np.random.default_rng((_SEED, scan.index, size))
    ink = coverage(scan, size)[..., None]  # (size, size, 1)
    of_ink, of_paper = (np.array(colour, np.float32) for colour in (INKS[scan.ink], PAPERS[scan.paper]))
    return grained(ink * of_ink + (1 - ink) * of_paper, scan.shift, rng)


def grained(picture: np.ndarray, shift: float, rng: np.random.Generator) -> Image.Image:
    """Colours (H, W, 3) as a picture: its luminance shifted, grained by pixel, rounded up or down at random."""
    grain = rng.normal(size=(*picture.shape[:2], 1)).clip(-_MAX_GRAIN, _MAX_GRAIN)
    rounding = rng.random(picture.shape)
    return Image.fromarray(np.floor(picture + shift + grain + rounding).astype(np.uint8))


@lru_cache(maxsize=1)
def _all_scans() -> Dict[str, Tuple[Scan, ...]]:
    images, digits = _read_scikit_learn()
    rng = np.random.default_rng(_SEED)
    order = rng.permutation(NUM_SCANS)
    scans = {}
    for split, count in SPLITS.items():
        members, order = order[:count], order[count:]
        pairs = list(product(INKS, PAPERS))
        colours = rng.permutation(np.arange(count) % len(pairs))
        shifts = rng.uniform(-MAX_SHIFT, MAX_SHIFT, count)
        scans[split] = tuple(
            Scan(int(i), int(digits[i]), ink, paper, float(shift), images[i].tobytes())
            for i, (ink, paper), shift in zip(members, [pairs[c] for c in colours], shifts)
        )
    return scans


def _read_scikit_learn() -> Tuple[np.ndarray, np.ndarray]:
    """Ink levels (1797, 8, 8) uint8 and digits (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the scanned digits come with scikit-learn: pip install "lavis-kvmod[demo]"') from error
    data = load_digits()
    if data.images.shape != (NUM_SCANS, _RESOLUTION, _RESOLUTION):
        raise RuntimeError(
            f"expected {NUM_SCANS} scans of {_RESOLUTION}x{_RESOLUTION} pixels from scikit-learn, "
            f"got {data.images.shape}"
        )
    return data.images.astype(np.uint8), data.target
