"""``artquest``: questions about paintings, in the layout of ArtQuest.

ArtQuest (T. Bleidt, S. Eslami, G. de Melo, "ArtQuest: Countering Hidden Language Biases in ArtVQA", WACV 2024) is three
CSV files with ``image``, ``question``, ``answer`` and ``question_type`` (artist, school, timeframe, type, technique,
title) over the pictures of SemArt (N. Garcia, G. Vogiatzis, arXiv 1810.09617).
"""

from lavis_kvmod.datasets.custom import CustomVQABuilder

__all__ = ["ArtQuestBuilder"]


class ArtQuestBuilder(CustomVQABuilder):
    """``artquest``: questions about paintings. `CustomVQABuilder` with ArtQuest's file names as defaults."""

    files_from = "get the CSV files of https://zenodo.org/records/10453925, put them there"
    images_from = "get the folder Images of SemArt (https://arxiv.org/abs/1810.09617), put it there"

    DATASET_CONFIG_DICT = {"default": "configs/datasets/artquest/defaults.yaml"}
