"""Images and the texts that belong to them, in the lists that retrieval wants: ``text``, ``img2txt``, ``txt2img``."""

from typing import Any, Dict, List, Sequence

from lavis_kvmod.datasets.annotated import AnnotatedDataset, Annotation, CaptionTrainData, Sample
from lavis_kvmod.datasets.bad_samples import BadDataError
from lavis_kvmod.datasets.builder import Splits
from lavis_kvmod.datasets.custom import CustomCaptionBuilder

__all__ = ["CustomRetrievalBuilder", "RetrievalEvalData"]


class RetrievalEvalData(AnnotatedDataset):
    """Images, each once, and the distinct captions of all of them as the texts to be found.

    A text that several images have belongs to all of them. (LAVIS's ``RetrievalEvalDataset`` has it several times.)

    Attributes:
        text, image: the texts, and the images' names.
        img2txt, txt2img: for each image the numbers of its texts, for each text those of its images.

    Args: see `AnnotatedDataset`.
    """

    def __init__(self, vis_processor: Any, text_processor: Any, annotations: Sequence[Annotation], **options: Any):
        super().__init__(vis_processor, text_processor, annotations, **options)
        numbers: Dict[str, int] = {}
        self.image: List[str] = []
        self.img2txt: Dict[int, List[int]] = {}
        for i, row in enumerate(annotations):
            texts = dict.fromkeys(self.text_processor(caption) for caption in row.get("caption") or ())
            self.img2txt[i] = [numbers.setdefault(text, len(numbers)) for text in texts]
            self.image.append(str(row.get("image_name", row["image"])))
        self.text = list(numbers)
        self.txt2img: Dict[int, List[int]] = {number: [] for number in numbers.values()}
        for i, texts_of_image in self.img2txt.items():
            for number in texts_of_image:
                self.txt2img[number].append(i)

    def _texts(self, annotation: Annotation) -> Sample:
        """The image's number in the data set."""
        return {"index": int(annotation["instance_id"]), "image_id": annotation["image_id"]}


class CustomRetrievalBuilder(CustomCaptionBuilder):
    """``custom_retrieval``: what ``custom_caption`` reads; texts are found for images, and images for texts."""

    DATASET_CONFIG_DICT = {"default": "configs/datasets/custom/defaults_retrieval.yaml"}
    train_dataset_cls = CaptionTrainData
    eval_dataset_cls = RetrievalEvalData
    several_images = False

    def prepare(self) -> Splits:
        """As any; a split without captions has nothing to be found.

        Raises:
            BadDataError: for that, and as any.
        """
        splits = super().prepare()
        problems = [
            f"{split}: none of its {len(rows)} images has a caption, so there is no text to be found"
            for split, rows in splits.items()
            if not any(row.get("caption") for row in rows)
        ]
        if problems:
            raise BadDataError(problems)
        return splits
