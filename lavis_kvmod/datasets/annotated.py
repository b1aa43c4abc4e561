"""Data sets made of a list of annotations: questions with answers, or images with captions.

An annotation is a dict:

=================  =====================================================================================================
``image``          absolute path of the image file; of several images of a row, or of none, a tuple of them
``image_id``       any number or text; the same for all rows of an image
``frames``         of a video, whose path ``image`` then is: how many of its frames are seen
``frames_by``      and which: see `lavis_kvmod.datasets.video.read_frames`
``source``         where it was read, for messages: ``train.csv, row 12``
``question``       VQA; with ``question_id`` (any number or text, unique), and maybe ``question_type``, ``answer_type``
``answer``         VQA: list of texts, as many as there were annotators; absent where the answers are not known
``weight``         VQA: list of numbers, one for each answer; by default the share of annotators who gave it
``caption``        captions: list of texts (in training, of one)
``instance_id``    added here, as LAVIS does: the position in the data set, as text
=================  =====================================================================================================

Batches are LAVIS's: see `collate`.
"""

import hashlib
import logging
import numbers
import re
from typing import Any, Callable, Dict, Hashable, List, Optional, Sequence, Set, Tuple

import torch
from lavis.datasets.datasets.base_dataset import BaseDataset
from lavis.datasets.datasets.caption_datasets import CaptionDataset
from lavis.datasets.datasets.vqa_datasets import VQADataset
from lavis.processors.blip_processors import BlipImageEvalProcessor
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lavis_kvmod.datasets.bad_samples import BadDataError, BadSamplePolicy, some_of
from lavis_kvmod.datasets.images import BadImageError, read_image
from lavis_kvmod.datasets.row_store import RowStore
from lavis_kvmod.datasets.tiling import Tiled, view_of
from lavis_kvmod.datasets.video import read_frames

__all__ = [
    "AnnotatedDataset",
    "CaptionEvalData",
    "CaptionTrainData",
    "VQAEvalData",
    "VQATrainData",
    "answers_and_weights",
    "collate",
    "pixel_key",
]

Annotation = Dict[str, Any]
Sample = Dict[str, Any]

_BLANK = (64, 64)  # a picture that only tells the size of those there are not


def answers_and_weights(annotation: Annotation) -> Tuple[List[str], List[float]]:
    """The distinct answers in the order given, and what each weighs: its share of the annotators, as in LAVIS, or its
    own ``weight``s together. Annotators who said nothing are left out, and their weight with them; they still count
    where answers are scored."""
    answers = annotation.get("answer") or []
    weights = annotation.get("weight") or [1 / len(answers) for _ in answers]
    total: Dict[str, float] = {}
    for answer, weight in zip(answers, weights):
        if answer.strip():
            total[answer] = total.get(answer, 0.0) + weight
    return list(total), list(total.values())


def collate(samples: Sequence[Sample]) -> Dict[str, Any]:
    """A batch as LAVIS's collaters make it.

    ``image`` (b, 3, H, W); where a sample has several, (b, k, 3, H, W) with ``image_mask`` (b, k), true where there is
    one, and ``image_key`` a list each. ``answer`` (all answers, flat), ``weight`` (sum of n,) and ``n_answers`` (b,)
    from the samples' ``answers`` and ``weights``; ids as a tensor where all are whole numbers, else as a list; all else
    as lists of b. ``bad_samples`` is there only if there were any. Keys that some samples lack are left out.
    """
    shared = [key for key in samples[0] if all(key in sample for sample in samples)]
    batch: Dict[str, Any] = {}
    for key in shared:
        values = [sample[key] for sample in samples]
        if key == "image":
            batch.update(_images(values))
        elif key == "image_place":
            batch[key] = pad_sequence(values, batch_first=True)
        elif key == "image_key" and any(isinstance(value, list) for value in values):
            batch[key] = [value if isinstance(value, list) else [value] for value in values]
        elif key == "answers":
            batch["answer"] = [answer for answers in values for answer in answers]
            batch["n_answers"] = torch.tensor([len(answers) for answers in values])
        elif key == "weights":
            batch["weight"] = torch.tensor([weight for weights in values for weight in weights], dtype=torch.float32)
        elif key in ("question_id", "image_id"):
            batch[key] = _ids(values)
        elif key != "bad_samples":
            batch[key] = values
    bad = [text for sample in samples for text in sample.get("bad_samples", ())]
    return {**batch, "bad_samples": bad} if bad else batch


def _images(values: Sequence[Tensor]) -> Dict[str, Tensor]:
    """Images (3, H, W), or several of a sample (k, 3, H, W), together."""
    if all(value.ndim == 3 for value in values):
        return {"image": torch.stack(list(values))}
    each = [value if value.ndim == 4 else value.unsqueeze(0) for value in values]
    numbers = torch.tensor([len(value) for value in each])
    return {
        "image": pad_sequence(each, batch_first=True),
        "image_mask": torch.arange(int(numbers.max())) < numbers.unsqueeze(1),
    }


def _ids(values: List[Any]) -> Any:
    """LAVIS's tasks want a tensor, which holds whole numbers of 64 bits only."""
    whole = all(isinstance(v, numbers.Integral) and not isinstance(v, bool) and abs(int(v)) < 2**63 for v in values)
    return torch.tensor(values) if whole else values


def pixel_key(vis_processor: Any) -> Optional[str]:
    """What tells apart image processors that give the same pixels every time; None for any other."""
    if isinstance(vis_processor, Tiled):
        inner = pixel_key(vis_processor.processor)
        return None if inner is None else f"{inner}:{vis_processor.side}:{vis_processor.tiles.grids}"
    if type(vis_processor) is not BlipImageEvalProcessor:
        return None
    return hashlib.sha256(repr(vis_processor.transform).encode()).hexdigest()[:8]


class AnnotatedDataset(BaseDataset):
    """What the data sets share: reading an image, and going on without those that cannot be read.

    Where the image processor gives the same pixels every time, a sample carries an ``image_key``: equal keys mean equal
    pixels, and a model may remember what its frozen encoders said of them.

    Args:
        vis_processor, text_processor: LAVIS processors.
        annotations: see the module; kept as a `RowStore`, with an ``instance_id``.
        policy: what happens when an image cannot be read.
        answer_list: the answers to choose from, for tasks that rank them.
    """

    def __init__(
        self,
        vis_processor: Callable,
        text_processor: Callable,
        annotations: Sequence[Annotation],
        *,
        policy: BadSamplePolicy = BadSamplePolicy(),  # noqa: B008  (frozen)
        answer_list: Optional[Sequence[str]] = None,
    ):
        super().__init__(vis_processor, text_processor, None, [])  # no files
        self.annotation = RowStore({**row, "instance_id": str(i)} for i, row in enumerate(annotations))
        self.on_bad_sample = policy.on_bad_sample
        self.max_bad_share = policy.max_bad_share
        self.answer_list = None if answer_list is None else list(answer_list)
        self._warned: Set[str] = set()  # of what kinds, in this process

    def __getitem__(self, index: int) -> Sample:
        """The sample there, or, with ``on_bad_sample: skip``, the next that can be read; ``bad_samples`` has a line for
        each that could not.

        Raises:
            BadDataError: for an image that cannot be read, or, when skipping, for more of them in a row than
                ``max_bad_share`` of the data set.
            IndexError: past the end.
        """
        return self.sample(index, {})

    def image_of(self, index: int) -> Hashable:
        """What the image of a sample, or its images together, are known by."""
        return self.annotation[index]["image"] or ("no image", index)

    def sample(self, index: int, views: Dict[Hashable, Sample]) -> Sample:
        """The same, sharing what is seen of an image among the samples that show it: see
        `lavis_kvmod.datasets.loading.images`."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"no sample {index} in a data set of {len(self)}")
        bad: List[str] = []
        while True:
            annotation = self.annotation[(index + len(bad)) % len(self)]
            try:
                seen = views.get(annotation["image"]) or self._read(annotation)
            except BadImageError as error:
                bad.append(f"{annotation['source']}: {error}")
                self._note(bad, error)
                views = {}  # what stands in for a bad image is drawn under that one's seed
                continue
            views[annotation["image"]] = seen
            return {**seen, **self._texts(annotation), "bad_samples": bad}

    def _note(self, bad: List[str], error: BadImageError) -> None:
        if self.on_bad_sample != "skip":
            raise BadDataError(f"{bad[-1]}; mend it, or set on_bad_sample: skip") from error
        if len(bad) > self.max_bad_share * len(self):
            raise BadDataError(
                f"{len(bad)} samples in a row could not be read, more than max_bad_share: {self.max_bad_share:g} of "
                f"{len(self)}{some_of(bad)}"
            ) from error
        cause = re.sub(r"\d+", "", str(error).rsplit(": ", 1)[-1])
        if cause not in self._warned:
            self._warned.add(cause)
            logging.warning("skipped: %s; others like it are counted at the epoch's end", bad[-1])

    def _read(self, annotation: Annotation) -> Sample:
        """What is seen of a row's image, or of its images. Raises BadImageError."""
        paths = annotation["image"]
        if annotation.get("frames"):
            frames = read_frames(paths, annotation["frames"], annotation["frames_by"])
            named = [(f"{paths}@{time:.3f}", frame) for time, frame in frames]
        elif isinstance(paths, str):
            return self._seen(read_image(paths), annotation)
        else:
            named = [(path, read_image(path)) for path in paths]
        if not named:
            blank = self._seen(Image.new("RGB", _BLANK), annotation)
            return {key: [] if key == "image_key" else value[None][:0] for key, value in blank.items()}
        seen = [self._seen(image, {**annotation, "image": name}) for name, image in named]
        together: Sample = {"image": torch.stack([each["image"] for each in seen])}
        return {**together, "image_key": [each["image_key"] for each in seen]} if "image_key" in seen[0] else together

    def _seen(self, image: Image.Image, annotation: Annotation) -> Sample:
        key = pixel_key(self.vis_processor)
        return view_of(self.vis_processor, image, None if key is None else f"{key}:{annotation['image']}")

    def _texts(self, annotation: Annotation) -> Sample:
        """Everything but the image."""
        raise NotImplementedError

    def collater(self, samples: Sequence[Sample]) -> Dict[str, Any]:
        """See `collate`."""
        return collate(samples)


class VQATrainData(AnnotatedDataset, VQADataset):
    """Questions with their answers, for training."""

    def _texts(self, annotation: Annotation) -> Sample:
        answers, weights = answers_and_weights(annotation)
        return {"text_input": self.text_processor(annotation["question"]), "answers": answers, "weights": weights}


class VQAEvalData(AnnotatedDataset):
    """Questions by id; with their answers where the split has them, so that a loss can be computed."""

    def _texts(self, annotation: Annotation) -> Sample:
        sample = {key: annotation[key] for key in ("question_id", "image_id", "instance_id")}
        sample["text_input"] = self._question(annotation)
        answers, weights = answers_and_weights(annotation)
        return {**sample, "answers": answers, "weights": weights} if answers else sample

    def _question(self, annotation: Annotation) -> str:
        return str(self.text_processor(annotation["question"]))


class CaptionTrainData(AnnotatedDataset, CaptionDataset):
    """Images with one caption each, for training; an image with five captions is there five times."""

    def _texts(self, annotation: Annotation) -> Sample:
        return {"text_input": self.text_processor(annotation["caption"][0]), "image_id": annotation["image_id"]}


class CaptionEvalData(AnnotatedDataset):
    """Images, each once; with the first caption where the split has them, so that a loss can be computed."""

    def _texts(self, annotation: Annotation) -> Sample:
        sample = {key: annotation[key] for key in ("image_id", "instance_id")}
        if annotation.get("caption"):
            sample["text_input"] = self.text_processor(annotation["caption"][0])
        return sample
