"""``digits_vqa`` and ``digits_caption``: the demo's handwriting as LAVIS data sets. Nothing is downloaded.

A sample carries an ``image_key``, a promise that equal keys mean equal pixels: a model may then remember what its
frozen encoders said of the image. Where the image processor is random there is no such promise, and no key.
"""

from functools import lru_cache
from itertools import product
from typing import Any, Callable, Dict, List, Optional, Sequence, Type

import numpy as np
import torch
from lavis.datasets.datasets.base_dataset import BaseDataset
from lavis.datasets.datasets.vqa_datasets import VQADataset
from lavis.processors.blip_processors import BlipImageEvalProcessor
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from lavis_kvmod.datasets.packaged import PackagedBuilder
from lavis_kvmod.datasets.settings import DataSettings, DigitsSettings
from lavis_kvmod.datasets.tiling import Tiled, view_of
from lavis_kvmod.demo import digits

__all__ = [
    "DigitsCaptionBuilder",
    "DigitsCaptionDataset",
    "DigitsCaptionEvalDataset",
    "DigitsRetrievalBuilder",
    "DigitsRetrievalEvalDataset",
    "DigitsVQABuilder",
    "DigitsVQADataset",
    "DigitsVQAEvalDataset",
]


class _Digits(BaseDataset):
    """What the four data sets share: one split's scans, and an ``annotation`` whose entries name theirs.

    Args:
        vis_processor, text_processor: LAVIS processors.
        split: see `lavis_kvmod.demo.digits.load_scans`, as are the errors raised.
        first: only so many of its scans; None for all.
    """

    def __init__(self, vis_processor: Callable, text_processor: Callable, split: str, first: Optional[int] = None):
        super().__init__(vis_processor, text_processor, None, [])  # no files
        self.scans = self._scans(split)[:first]
        self.annotation = [
            {"image_id": f"{scan.index:04d}", **entry, "scan": row}
            for row, scan in enumerate(self.scans)
            for entry in self._entries(scan)
        ]
        self._add_instance_ids()
        self._pictures = self._rendered(split)

    def _scans(self, split: str) -> List[Any]:
        """What is shown: each has an ``index`` and a ``key`` of its own."""
        return digits.load_scans(split)

    def _rendered(self, split: str) -> np.ndarray:
        """Their pictures (N, H, W, 3), uint8."""
        return _pictures(split)

    def _entries(self, scan: digits.Scan) -> List[Dict[str, Any]]:
        """The annotations of one scan."""
        raise NotImplementedError

    def picture(self, annotation: Dict[str, Any]) -> Image.Image:
        """The picture that an annotation belongs to."""
        return Image.fromarray(self._pictures[annotation["scan"]])

    def __getitem__(self, index: int) -> Dict[str, Any]:
        """``image`` (3, H, W), ``image_key`` where the processor gives the same pixels every time, and the texts."""
        return self.sample(index, {})

    def image_of(self, index: int) -> int:
        """What the image of a sample is known by."""
        return self.annotation[index]["scan"]

    def sample(self, index: int, views: Dict[int, Dict[str, Any]]) -> Dict[str, Any]:
        """The same, sharing what is seen of a scan among the samples that show it."""
        annotation = self.annotation[index]
        if annotation["scan"] not in views:
            views[annotation["scan"]] = self._image(annotation)
        return {**views[annotation["scan"]], **self._texts(annotation)}

    def _texts(self, annotation: Dict[str, Any]) -> Dict[str, Any]:
        """Everything but the image."""
        raise NotImplementedError

    def _image(self, annotation: Dict[str, Any]) -> Dict[str, Any]:
        inner = self.vis_processor.processor if isinstance(self.vis_processor, Tiled) else self.vis_processor
        same = isinstance(inner, BlipImageEvalProcessor)
        key = self.scans[annotation["scan"]].key if same else None
        return view_of(self.vis_processor, self.picture(annotation), key)


class _DigitsVQA(_Digits):
    """Four questions for each scan."""

    def _entries(self, scan: digits.Scan) -> List[Dict[str, Any]]:
        return [
            {
                "question_id": f"{scan.index:04d}-{question.type}",
                "question": question.question,
                "question_type": question.type,
                "answer": [question.answer],
            }
            for question in digits.questions(scan)
        ]


class DigitsVQADataset(_DigitsVQA, VQADataset):
    """Questions with their answers, for training; batches are LAVIS's VQA batches."""

    def _texts(self, annotation: Dict[str, Any]) -> Dict[str, Any]:
        return {
            "text_input": self.text_processor(annotation["question"]),
            "answers": annotation["answer"],
            "weights": [1.0],
        }

    def collater(self, samples: Sequence[Dict[str, Any]]) -> Dict[str, Any]:
        """LAVIS's batch (``image``, ``text_input``, ``answer``, ``weight``, ``n_answers``), and the ids and keys."""
        batch = super().collater(samples)
        keys = [key for key in ("question_id", "instance_id", "image_key") if all(key in s for s in samples)]
        places = [sample["image_place"] for sample in samples if "image_place" in sample]
        tiled = {"image_place": torch.stack(places)} if places else {}
        return {**batch, **tiled, **{key: [sample[key] for sample in samples] for key in keys}}


class DigitsVQAEvalDataset(DigitsVQADataset):
    """Questions by id, with their answers, so that a loss can be computed; the ground truth is in ``annotation``.

    Attributes:
        answer_list: every answer there is, for tasks that rank them.
    """

    def __init__(self, vis_processor: Callable, text_processor: Callable, split: str, first: Optional[int] = None):
        super().__init__(vis_processor, text_processor, split, first)
        self.answer_list = [*digits.DIGIT_WORDS, *digits.INKS, *digits.PAPERS, "yes", "no"]

    def _texts(self, annotation: Dict[str, Any]) -> Dict[str, Any]:
        return {**super()._texts(annotation), **{key: annotation[key] for key in ("question_id", "instance_id")}}


class _DigitsCaption(_Digits):
    """One caption for each scan.

    Args:
        wrong_captions: of how many (a share) the caption is another scan's.
    """

    def __init__(
        self,
        vis_processor: Callable,
        text_processor: Callable,
        split: str,
        first: Optional[int] = None,
        wrong_captions: float = 0.0,
    ):
        scans = self._scans(split)[:first]
        self._captions = dict(zip((scan.index for scan in scans), digits.captions(scans, wrong_captions)))
        super().__init__(vis_processor, text_processor, split, first)

    def _entries(self, scan: digits.Scan) -> List[Dict[str, Any]]:
        return [{"caption": [self._captions[scan.index]]}]


class DigitsCaptionDataset(_DigitsCaption):
    """Scans with their captions, for training."""

    def _texts(self, annotation: Dict[str, Any]) -> Dict[str, Any]:
        return {
            "text_input": self.text_processor(annotation["caption"][0]),
            "image_id": annotation["image_id"],
        }


class DigitsCaptionEvalDataset(DigitsCaptionDataset):
    """Scans by id, with their captions, so that a loss can be computed; the ground truth is in ``annotation``."""

    def _texts(self, annotation: Dict[str, Any]) -> Dict[str, Any]:
        return {**super()._texts(annotation), "instance_id": annotation["instance_id"]}


class DigitsRetrievalEvalDataset(_DigitsCaption):
    """Scans, and every description there is (240) as the texts to be found; LAVIS's lists say which belong together.

    Attributes:
        text, image: the descriptions, and the scans' names.
        img2txt, txt2img: for each image the numbers of its texts, for each text those of its images.
    """

    def __init__(self, vis_processor: Callable, text_processor: Callable, split: str, **of_captions: Any):
        super().__init__(vis_processor, text_processor, split, **of_captions)
        described = [self.text_processor(digits.caption(scan)) for scan in self.scans]
        words = product(digits.INKS, digits.DIGIT_WORDS, digits.PAPERS)
        self.text = [self.text_processor(f"a {ink} {digit} on {paper} paper") for ink, digit, paper in words]
        self.image = [scan.key for scan in self.scans]
        number = {text: i for i, text in enumerate(self.text)}
        self.img2txt = {i: [number[text]] for i, text in enumerate(described)}
        self.txt2img: Dict[int, List[int]] = {i: [] for i in range(len(self.text))}
        for i, text in enumerate(described):
            self.txt2img[number[text]].append(i)

    def __getitem__(self, index: int) -> Dict[str, Any]:
        """``image`` (3, H, W), its number ``index``, ``image_key``."""
        return {**self._image(self.annotation[index]), "index": index}


@lru_cache(maxsize=None)
def _pictures(split: str) -> np.ndarray:
    """All scans of a split, rendered: (N, 56, 56, 3), uint8, read-only (17 MB for all three splits)."""
    pictures = np.stack([np.asarray(digits.render(scan)) for scan in digits.load_scans(split)])
    pictures.setflags(write=False)
    return pictures


class _DigitsBuilder(PackagedBuilder):
    """Builds the three splits; see `lavis_kvmod.demo.digits` for what is in them."""

    settings_class: Type[DataSettings] = DigitsSettings

    def build(self) -> Dict[str, _Digits]:
        """``train``, ``val`` and ``test``."""
        self.build_processors()
        datasets = {}
        for split in digits.SPLITS:
            stage = "train" if split == "train" else "eval"
            dataset_cls = self.train_dataset_cls if split == "train" else self.eval_dataset_cls
            processors = self.vis_processors[stage], self.text_processors[stage]
            datasets[split] = dataset_cls(*processors, split, **self._options(split))
        return datasets

    def _options(self, split: str) -> Dict[str, Any]:
        """More arguments of a split's data set."""
        return {"first": self.settings.train_scans if split == "train" else None}


class _CaptionsBuilder(_DigitsBuilder):
    """``build_info.wrong_captions: {train: 0.3}`` gives a share of a split's scans the captions of others."""

    @classmethod
    def config_problems(cls, section: DictConfig) -> List[str]:
        """Splits that are not there, and shares that are none."""
        problems = cls.section_problems(section)
        given = OmegaConf.select(section, "build_info.wrong_captions")
        if given is None:
            return problems
        if not OmegaConf.is_dict(given):
            told = f"build_info.wrong_captions: expected shares by split, such as {{train: 0.3}}; got {given!r}"
            return [*problems, told]
        return problems + [
            f"build_info.wrong_captions.{split}: expected a share from 0 to 1 of one of {', '.join(digits.SPLITS)}; "
            f"got {share!r}"
            for split, share in given.items()
            if split not in digits.SPLITS or not isinstance(share, (int, float)) or not 0 <= share <= 1
        ]

    def _options(self, split: str) -> Dict[str, Any]:
        wrong = (self.config.get("build_info") or {}).get("wrong_captions") or {}
        return {**super()._options(split), "wrong_captions": float(wrong.get(split, 0.0))}


class DigitsVQABuilder(_DigitsBuilder):
    """``digits_vqa``: which digit, what ink, what paper, is the digit even."""

    target = "answer"
    train_dataset_cls = DigitsVQADataset
    eval_dataset_cls = DigitsVQAEvalDataset
    DATASET_CONFIG_DICT = {"default": "configs/datasets/digits/defaults_vqa.yaml"}


class DigitsCaptionBuilder(_CaptionsBuilder):
    """``digits_caption``: such as "a red seven on yellow paper"."""

    target = "caption"
    train_dataset_cls = DigitsCaptionDataset
    eval_dataset_cls = DigitsCaptionEvalDataset
    DATASET_CONFIG_DICT = {"default": "configs/datasets/digits/defaults_caption.yaml"}


class DigitsRetrievalBuilder(_CaptionsBuilder):
    """``digits_retrieval``: captions to train on, and 240 descriptions to be found for held-out scans."""

    target = "caption"
    train_dataset_cls = DigitsCaptionDataset
    eval_dataset_cls = DigitsRetrievalEvalDataset
    DATASET_CONFIG_DICT = {"default": "configs/datasets/digits/defaults_retrieval.yaml"}
