"""``artquest``: questions about paintings, in the layout of ArtQuest.

ArtQuest (T. Bleidt, S. Eslami, G. de Melo, "ArtQuest: Countering Hidden Language Biases in ArtVQA", WACV 2024) is three
CSV files with ``image``, ``question``, ``answer`` and ``question_type`` (artist, school, timeframe, type, technique,
title) over the pictures of SemArt (N. Garcia, G. Vogiatzis, arXiv 1810.09617).
"""

from lavis_kvmod.datasets.custom import CustomVQABuilder

__all__ = ["ArtQuestBuilder"]


class ArtQuestBuilder(CustomVQABuilder):
    """`CustomVQABuilder` with ArtQuest's file names as defaults."""

    DATASET_CONFIG_DICT = {"default": "configs/datasets/artquest/defaults.yaml"}
