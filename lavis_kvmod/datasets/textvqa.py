"""``textvqa``: questions about text in images (arXiv 1904.08920), from the files of textvqa.org."""

from pathlib import Path
from typing import List

from omegaconf import DictConfig

from lavis_kvmod.datasets.annotated import Annotation
from lavis_kvmod.datasets.bad_samples import BadDataError
from lavis_kvmod.datasets.normalisation import normalise
from lavis_kvmod.datasets.official import BenchmarkFile, entries, image_path
from lavis_kvmod.datasets.vqav2 import OfficialVQABuilder

__all__ = ["TextVQABuilder"]


class TextVQABuilder(OfficialVQABuilder):
    """``textvqa``: questions about text in images.

    A split is one file, ``{"data": [{"question_id", "image_id", "question", "answers": [text, …]}, …]}``; test has
    no answers.

    Its server and evaluation code take what VQA's do. That code normalises people's answers too, where VQA's leaves
    them as published; so they are normalised here, for evaluation.
    """

    benchmark = "textvqa"
    DATASET_CONFIG_DICT = {"default": "configs/datasets/textvqa/defaults.yaml"}

    def files(self, split: str, section: DictConfig) -> List[BenchmarkFile]:
        """The split's one file."""
        return [BenchmarkFile.from_config(split, f"build_info.annotations.{split}", section)]

    def read(self, paths: List[Path], section: DictConfig) -> List[Annotation]:
        """The file's rows; ``image_classes`` and the like are left out.

        Raises:
            BadDataError: for another layout.
        """
        (path,) = paths
        rows = []
        for number, entry in enumerate(entries(path, "data")):
            missing = [key for key in ("question_id", "image_id", "question") if key not in entry]
            if missing:
                raise BadDataError(f"{path}: entry {number} of 'data' has no {', '.join(missing)}")
            row = {
                "image": image_path(section.images.pattern, entry["image_id"], path),
                "source": f"{path.name}, question {entry['question_id']}",
                **{key: entry[key] for key in ("image_id", "question", "question_id")},
            }
            if entry.get("answers"):
                row["answer"] = [str(answer) for answer in entry["answers"]]
            rows.append(row)
        return rows

    def arrange(self, split: str, rows: List[Annotation]) -> List[Annotation]:
        """Answers as they are compared with; as they were given under ``answer_as_given``."""
        if split == "train":
            return rows
        return [
            {**row, "answer": [normalise(answer) for answer in row["answer"]], "answer_as_given": row["answer"]}
            if row.get("answer")
            else row
            for row in rows
        ]
