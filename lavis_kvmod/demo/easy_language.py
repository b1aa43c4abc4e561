"""A language model that has read easy-VQA's questions, each with a colour and a shape in words."""

from pathlib import Path
from typing import Dict, List, Sequence

import numpy as np

from lavis_kvmod.demo.described_language import Asked, DescribedLanguageRecipe, train_described_language_model

__all__ = ["COLOURS", "SHAPES", "train_easy_language_model"]

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


def train_easy_language_model(recipe: DescribedLanguageRecipe, folder: Path) -> float:
    """As `train_described_language_model`, on the training questions about drawings whose colour and shape are among
    the answers.

    Raises:
        ImportError: without the package, with the command that installs it.
    """
    described = _described()

    def draw(rng: np.random.Generator) -> List[Asked]:
        return described[int(rng.integers(len(described)))]

    return train_described_language_model(recipe, folder, draw)


def _described() -> List[List[Asked]]:
    """By drawing, what is asked about it; a drawing is described by its colour and its shape."""
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError('the questions come with the package easy-vqa: pip install "lavis-kvmod[demo]"') from error
    asked: Dict[int, List[List[str]]] = {}
    for question, answer, drawing in zip(*easy_vqa.get_train_questions()):
        asked.setdefault(drawing, []).append([question, answer])
    described = []
    for rows in asked.values():
        said = sorted({answer for _, answer in rows} - {"yes", "no"}, key=SHAPES.__contains__)
        if len(said) == 2:  # a colour, and a shape
            described.append([Asked(said, *row) for row in rows for _ in range(_weight(said, *row))])
    return described


def _weight(said: Sequence[str], question: str, answer: str) -> int:
    """How often a row comes, so that what is asked for is there as often as not.

    Who is asked for one of eight colours is mostly right with "no", and a model would learn no more than that.
    """
    asked_for = [phrase for phrase in said if phrase in question.strip("?").split()]
    if answer not in ("yes", "no") or not asked_for:
        return 1
    return (len(SHAPES) if asked_for[0] in SHAPES else len(COLOURS)) - 1
