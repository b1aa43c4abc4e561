"""``easy_vqa``: 5,000 drawings of a coloured shape and 48,248 questions about them, which come as a Python package.

easy-VQA (V. Zhou, https://github.com/vzhou842/easy-VQA) was made by nobody here, and its answers hang on colour or on
shape alone: what colour, what shape, is there such a one, is there none.
"""

from types import ModuleType
from typing import Any, Dict, List, Optional, Sequence, Tuple

from omegaconf import DictConfig

from lavis_kvmod.datasets.annotated import Annotation
from lavis_kvmod.datasets.bad_samples import BadDataError
from lavis_kvmod.datasets.builder import Splits, VQABuilder
from lavis_kvmod.datasets.image_folders import ImageFolders
from lavis_kvmod.datasets.settings import EasyVQASettings
from lavis_kvmod.datasets.splits import DEFAULT_SEED, split_by_image
from lavis_kvmod.demo.easy_language import SHAPES

__all__ = ["EasyVQABuilder"]

# Of the drawings to train on: the package has none to validate on.
VAL_SHARE = 0.1


class EasyVQABuilder(VQABuilder):
    """``easy_vqa``: drawings of a coloured shape: what colour, what shape, is there such a one.

    The splits are ``train`` (3,600 drawings, or the first ``train_drawings`` of them), ``val`` (400 taken from train,
    by seed) and ``test`` (1,000). ``question_type`` is ``colour``, ``shape``, ``has colour`` or ``has shape``;
    ``answer_type`` is ``yes/no`` or ``other``.
    """

    DATASET_CONFIG_DICT = {"default": "configs/datasets/easy_vqa/defaults.yaml"}
    settings_class = EasyVQASettings

    @classmethod
    def splits_given(cls, section: DictConfig) -> List[str]:
        """The splits a run may use."""
        return ["train", "val", "test"]

    def annotations(self) -> Splits:
        """All questions with their answers.

        Raises:
            BadDataError: without the package, with the command that installs it.
        """
        package = _package()
        return {
            "train": _rows("train", package.get_train_questions(), package.get_train_image_paths()),
            "test": _rows("test", package.get_test_questions(), package.get_test_image_paths()),
        }

    def image_folders(self) -> Optional[ImageFolders]:
        """None: the package gives absolute paths."""
        return None

    def divide(self, splits: Splits) -> Splits:
        """Takes ``val`` from ``train``, whole drawings at a time, and leaves as many to train on as are wanted."""
        divided = split_by_image(splits["train"], {"val": VAL_SHARE}, DEFAULT_SEED)
        drawings = list(dict.fromkeys(row["image"] for row in divided["train"]))
        kept = set(drawings[: self.settings.train_drawings])
        return {**splits, **divided, "train": [row for row in divided["train"] if row["image"] in kept]}

    def answer_list(self, splits: Splits) -> Optional[List[str]]:
        """The 13 answers there are."""
        return _package().get_answers()


def _package() -> ModuleType:
    try:
        import easy_vqa
    except ImportError as error:
        raise BadDataError('the drawings come with the package easy-vqa: pip install "lavis-kvmod[demo]"') from error
    return easy_vqa


def _rows(split: str, given: Tuple[Sequence[Any], ...], paths: Dict[int, str]) -> List[Annotation]:
    """Annotations, from the package's questions, answers and numbers of drawings."""
    return [
        {
            "image": paths[drawing],
            "image_id": f"{split}-{drawing}",
            "image_name": f"{split}/{drawing}.png",
            "source": f"easy-vqa {split}, question {number}",
            "question": question,
            "question_id": f"{split}-{number}",
            "question_type": _question_type(question, answer),
            "answer_type": "yes/no" if answer in ("yes", "no") else "other",
            "answer": [answer],
        }
        for number, (question, answer, drawing) in enumerate(zip(*given))
    ]


def _question_type(question: str, answer: str) -> str:
    if answer in ("yes", "no"):
        return "has shape" if any(shape in question for shape in SHAPES) else "has colour"
    return "shape" if answer in SHAPES else "colour"
