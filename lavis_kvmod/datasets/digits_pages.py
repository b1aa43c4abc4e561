"""``digits_pages``: several of the demo's handwritten digits on a page, with questions that say what they need."""

from functools import lru_cache
from typing import Any, Callable, Dict, List, Tuple

import numpy as np

from lavis_kvmod.datasets.digits import DigitsVQADataset, DigitsVQAEvalDataset
from lavis_kvmod.datasets.packaged import PackagedBuilder
from lavis_kvmod.datasets.settings import DataSettings
from lavis_kvmod.demo import digits, pages
from lavis_kvmod.demo.pages import PageSettings

__all__ = ["DigitsPagesBuilder", "DigitsPagesDataset", "DigitsPagesEvalDataset"]


class DigitsPagesSettings(PageSettings, DataSettings):
    """What ``digits_pages`` reads."""


class DigitsPagesDataset(DigitsVQADataset):
    """Questions about pages, with their answers, for training; ``answer_type`` says what a question needs.

    Args:
        vis_processor, text_processor: LAVIS processors.
        split: see `lavis_kvmod.demo.pages.load_pages`.
        settings: of the pages.
    """

    def __init__(self, vis_processor: Callable, text_processor: Callable, split: str, settings: PageSettings):
        self.settings = settings
        super().__init__(vis_processor, text_processor, split)

    def _scans(self, split: str) -> List[pages.Page]:
        return pages.load_pages(split, self.settings)

    def _rendered(self, split: str) -> np.ndarray:
        return _pictures(tuple(self.scans), self.settings.page_size, self.settings.digit_size)

    def _entries(self, scan: Any) -> List[Dict[str, Any]]:
        return [
            {
                "image_id": scan.key,
                "question_id": f"{scan.key}-{question.type.replace(' ', '_')}",
                "question": question.question,
                "question_type": question.type,
                "answer_type": question.needs,
                "answer": [question.answer],
            }
            for question in pages.questions(scan)
        ]


class DigitsPagesEvalDataset(DigitsPagesDataset, DigitsVQAEvalDataset):
    """The same, by id; every answer there is in ``answer_list``, for tasks that rank them."""

    def __init__(self, vis_processor: Callable, text_processor: Callable, split: str, settings: PageSettings):
        super().__init__(vis_processor, text_processor, split, settings)
        self.answer_list = [*digits.DIGIT_WORDS, *digits.INKS, *digits.PAPERS, "yes", "no"]


class DigitsPagesBuilder(PackagedBuilder):
    """``digits_pages``: what colour is the seven, which is left of the red one, how many are blue."""

    settings_class = DigitsPagesSettings
    target = "answer"
    train_dataset_cls = DigitsPagesDataset
    eval_dataset_cls = DigitsPagesEvalDataset
    DATASET_CONFIG_DICT = {"default": "configs/datasets/digits/defaults_pages.yaml"}

    def build(self) -> Dict[str, DigitsPagesDataset]:
        """``train``, ``val`` and ``test``.

        Raises:
            SettingsError: listing what is wrong with the section.
        """
        self.build_processors()
        settings = PageSettings.of(self.config)
        datasets = {}
        for split in digits.SPLITS:
            stage = "train" if split == "train" else "eval"
            dataset_cls = self.train_dataset_cls if split == "train" else self.eval_dataset_cls
            datasets[split] = dataset_cls(self.vis_processors[stage], self.text_processors[stage], split, settings)
        return datasets


@lru_cache(maxsize=6)
def _pictures(shown: Tuple[pages.Page, ...], page_size: int, digit_size: int) -> np.ndarray:
    """The pages as pictures (N, H, H, 3), uint8, read-only."""
    pictures = np.stack([np.asarray(pages.render(page, page_size, digit_size)) for page in shown])
    pictures.setflags(write=False)
    return pictures
