"""Several of the scanned digits on one page, each in its ink, and questions that tell the two encoders apart.

Each question says what it needs. Luminance is the same for all inks and for all papers (`digits`): an encoder that sees
luminance alone reads digits and places, and no colour. Scans keep their split; pages are fixed by seed and by settings.

============================  =============  ==========================================================================
question                      needs          because
============================  =============  ==========================================================================
Which digit is on the left?   the ViT        shape and place
What colour is the paper?     the CNN        one colour of the whole page
How many are blue?            the CNN        colours and how often, no shape
What colour is the seven?     both           a shape and a colour have to be brought together
Which is left of the red one? both           a colour, a place, a shape
Do they stand on one line?    neither        either encoder sees it alone: it must not suffer
============================  =============  ==========================================================================
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Dict, List, Literal, Sequence, Tuple

import numpy as np
from PIL import Image

from lavis_kvmod.demo import digits
from lavis_kvmod.system.schema import Settings, key

__all__ = [
    "NEEDS",
    "Page",
    "PageQuestion",
    "PageSettings",
    "Written",
    "description",
    "draw_page",
    "load_pages",
    "phrases",
    "questions",
    "render",
]

NEEDS = {
    "on the left": "needs the ViT",
    "paper": "needs the CNN",
    "how many": "needs the CNN",
    "ink of digit": "needs both",
    "left of ink": "needs both",
    "one line": "needs neither",
}

_SEED = 2302
_SAME_INK = 0.3  # of the pages have one ink twice on purpose, so that there is something to count
_ONE_LINE = 0.5  # of the pages


class PageSettings(Settings):
    """What a page looks like, and how many there are."""

    digits_a_page: int = key(2, "digits on a page, each in a column of its own", ge=2, le=10)
    page_size: int = key(56, "side of a page in pixels; the image processor may then resize it", gt=0)
    digit_size: int = key(28, "side of a digit in pixels: a large page of small digits is fine print", ge=8)
    train_scans: int = key(
        digits.SPLITS["train"], "scans that the training pages are written with: few are few labels", ge=10
    )
    pages_a_scan: int = key(2, "pages that each scan stands on", gt=0)
    shift: Literal["none", "ink_on_paper"] = key(
        "none", "`ink_on_paper`: two inks of each paper are kept for the test pages, which have no others"
    )

    def conflicts(self) -> List[str]:
        """More than fits, or than there is."""
        found = super().conflicts()
        if self.page_size // self.digit_size < self.digits_a_page:
            found.append(
                f"digits_a_page: {self.digits_a_page} digits of {self.digit_size} pixels do not fit side by side on a "
                f"page of {self.page_size}"
            )
        if self.train_scans > digits.SPLITS["train"]:
            found.append(f"train_scans: expected at most {digits.SPLITS['train']}, got {self.train_scans}")
        return found


@dataclass(frozen=True)
class Written:
    """A scan on a page: its digit, its ink, and its place in cells of a digit's size."""

    scan: digits.Scan
    ink: str
    column: int
    row: int

    @property
    def word(self) -> str:
        """The digit as a word."""
        return digits.DIGIT_WORDS[self.scan.digit]


@dataclass(frozen=True)
class PageQuestion:
    """A question of a kind in `NEEDS` about a page, and its answer in lower case."""

    type: str
    question: str
    answer: str

    @property
    def needs(self) -> str:
        """Which encoder has to know."""
        return NEEDS[self.type]


@dataclass(frozen=True)
class Page:
    """A page of its own.

    Attributes:
        index: its number within split and settings.
        key: a name that no other picture has.
        paper: a name in `digits.PAPERS`.
        written: the digits from left to right; no digit and no column comes twice.
        shift: of the luminance of the whole page, in 8-bit levels.
        asked: its questions.
    """

    index: int
    key: str
    paper: str
    written: Tuple[Written, ...]
    shift: float
    asked: Tuple[PageQuestion, ...]


def load_pages(split: str, settings: PageSettings) -> List[Page]:
    """The pages of ``train``, ``val`` or ``test``; raises as `digits.load_scans`."""
    scans = digits.load_scans(split)
    if split == "train":
        scans = scans[: settings.train_scans]
    return list(_pages(split, tuple(settings.model_dump().items()), tuple(scans)))


def render(page: Page, page_size: int = 56, digit_size: int = 28) -> Image.Image:
    """The page in its colours: an RGB picture of ``page_size`` a side, always the same one."""
    side = digit_size
    picture = np.empty((page_size, page_size, 3), np.float32)
    picture[:] = digits.PAPERS[page.paper]
    for one in page.written:
        top, left = one.row * side, one.column * side
        ink = digits.coverage(one.scan, side)[..., None]
        place = picture[top : top + side, left : left + side]
        place[:] = ink * np.array(digits.INKS[one.ink], np.float32) + (1 - ink) * place
    seed = [ord(letter) for letter in page.key]
    return digits.grained(picture, page.shift, np.random.default_rng(seed))


def questions(page: Page) -> List[PageQuestion]:
    """Those that the page allows: what is left of an ink is asked only where the ink is there once."""
    return list(page.asked)


def phrases(page: Page) -> List[str]:
    """What is to be seen, in phrases that may stand in any order: ``red seven left``, …, ``on yellow paper``."""
    written = page.written
    sides = ["left", *["middle"] * (len(written) - 2), "right"]
    of_digits = [f"{one.ink} {one.word} {side}" for one, side in zip(written, sides)]
    return [*of_digits, f"on {page.paper} paper", "one line" if _is_one_line(written) else "two lines"]


def description(page: Page) -> str:
    """The phrases, in one line of text."""
    return ", ".join(phrases(page))


# ---------------------------------------------------------------- drawing pages


@lru_cache(maxsize=16)
def _pages(split: str, items: Tuple[Tuple[str, Any], ...], scans: Tuple[digits.Scan, ...]) -> Tuple[Page, ...]:
    settings = PageSettings(**dict(items))
    rng = np.random.default_rng([_SEED, list(digits.SPLITS).index(split)])
    pool = [scans[i] for _ in range(settings.pages_a_scan) for i in rng.permutation(len(scans))]
    name = f"{split}-{_fingerprint(settings, split)}"
    pages: List[Page] = []
    while True:
        chosen = _take(pool, settings.digits_a_page)
        if not chosen:
            return tuple(pages)
        pages.append(draw_page(chosen, settings, rng, len(pages), f"page-{name}-{len(pages):04d}", split == "test"))


def _fingerprint(settings: PageSettings, split: str) -> str:
    """The settings that a page of a split hangs on: equal pages have equal names, whatever else a run changes."""
    values = settings.model_dump()
    return ".".join(str(value) for name, value in values.items() if split == "train" or name != "train_scans")


def _take(pool: List[digits.Scan], count: int) -> List[digits.Scan]:
    """The next scans with digits of their own, taken out of the pool; none if there are no more."""
    chosen: Dict[int, int] = {}  # digit -> place in the pool
    for place, scan in enumerate(pool):
        if scan.digit not in chosen:
            chosen[scan.digit] = place
        if len(chosen) == count:
            scans = [pool[i] for i in chosen.values()]
            for i in sorted(chosen.values(), reverse=True):
                del pool[i]
            return scans
    return []


def draw_page(
    scans: Sequence[digits.Scan], settings: PageSettings, rng: np.random.Generator, index: int, key: str, test: bool
) -> Page:
    """A page with these scans: places, colours and questions drawn; ``test`` counts where there is a shift."""
    cells = settings.page_size // settings.digit_size
    count = len(scans)
    columns = sorted(rng.permutation(cells)[:count].tolist())
    if rng.random() < _ONE_LINE:
        rows = [int(rng.integers(cells))] * count
    else:
        rows = rng.integers(cells, size=count).tolist()
        if len(set(rows)) == 1:
            rows[-1] = (rows[0] + int(rng.integers(1, cells))) % cells
    paper = _one_of(list(digits.PAPERS), rng)
    allowed = _inks(paper, settings.shift, test)
    inks = [_one_of(allowed, rng) for _ in range(count)]
    if rng.random() < _SAME_INK:
        first, second = rng.permutation(count)[:2].tolist()
        inks[second] = inks[first]
    written = tuple(Written(*of_one) for of_one in zip(scans, inks, columns, rows))
    shift = float(rng.uniform(-digits.MAX_SHIFT, digits.MAX_SHIFT))
    return Page(index, key, paper, written, shift, tuple(_ask(paper, written, rng)))


def _inks(paper: str, shift: str, test: bool) -> List[str]:
    """The inks that a paper is written on with."""
    inks = list(digits.INKS)
    if shift == "none":
        return inks
    place = list(digits.PAPERS).index(paper)
    kept = {inks[place], inks[(place + 3) % len(inks)]}  # every ink is seen in training, on other papers
    return [ink for ink in inks if (ink in kept) == test]


def _ask(paper: str, written: Sequence[Written], rng: np.random.Generator) -> List[PageQuestion]:
    inks = [one.ink for one in written]
    how_often = {ink: inks.count(ink) for ink in digits.INKS}
    # Each number that there is is asked for equally often, or the answer would mostly be one.
    number = _one_of(sorted(set(how_often.values())), rng)
    counted = _one_of([ink for ink, times in how_often.items() if times == number], rng)
    one = written[int(rng.integers(len(written)))]
    asked = [
        PageQuestion("on the left", "Which digit is on the left?", written[0].word),
        PageQuestion("paper", "What colour is the paper?", paper),
        PageQuestion("how many", f"How many are {counted}?", digits.DIGIT_WORDS[number]),
        PageQuestion("ink of digit", f"What colour is the {one.word}?", one.ink),
        PageQuestion("one line", "Do they stand on one line?", "yes" if _is_one_line(written) else "no"),
    ]
    once = [i for i in range(1, len(written)) if how_often[inks[i]] == 1]
    if once:
        i = _one_of(once, rng)
        asked.append(PageQuestion("left of ink", f"Which is left of the {inks[i]} one?", written[i - 1].word))
    return asked


def _is_one_line(written: Sequence[Written]) -> bool:
    return len({one.row for one in written}) == 1


def _one_of(items: Sequence[Any], rng: np.random.Generator) -> Any:
    return items[int(rng.integers(len(items)))]
