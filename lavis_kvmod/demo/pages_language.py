"""A language model that has read of several digits on a page."""

from pathlib import Path
from typing import List

import numpy as np

from lavis_kvmod.demo import digits, pages
from lavis_kvmod.demo.described_language import Asked, DescribedLanguageRecipe, train_described_language_model

__all__ = ["train_pages_language_model"]

_SETTINGS = pages.PageSettings()


def train_pages_language_model(recipe: DescribedLanguageRecipe, folder: Path) -> float:
    """As `train_described_language_model`, on pages of two digits that nobody has written."""
    return train_described_language_model(recipe, folder, _draw)


def _draw(rng: np.random.Generator) -> List[Asked]:
    scans = [digits.Scan(0, int(digit), "", "") for digit in rng.permutation(10)[: _SETTINGS.digits_a_page]]
    page = pages.draw_page(scans, _SETTINGS, rng, 0, "", False)
    return [Asked(pages.phrases(page), asked.question, asked.answer) for asked in pages.questions(page)]
