"""LAVIS's sets of questions."""

import logging
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from lavis_kvmod.datasets.annotated import Annotation
from lavis_kvmod.datasets.answer_list import read_answer_list
from lavis_kvmod.datasets.bad_samples import BadDataError
from lavis_kvmod.datasets.builder import Splits
from lavis_kvmod.datasets.lavis_sets.base import COCO_IMAGES, VG_IMAGES, LavisFilesBuilder, read_rows, rows_in
from lavis_kvmod.datasets.lavis_sets.files import annotation_files
from lavis_kvmod.datasets.official import answer_text, answers_of, entries, read_json
from lavis_kvmod.datasets.vqa_benchmark import BenchmarkVQABuilder, BenchmarkVQAEvalData

__all__ = ["AOKVQA", "COCOVQA", "GQA", "OKVQA", "VGVQA"]


class LavisVQABuilder(LavisFilesBuilder, BenchmarkVQABuilder):
    """Questions: all files of train; of an evaluated split the rows, a list of answers to choose from, and maybe the
    official files of questions and annotations."""

    optional_files: Sequence[int] = (1, 2)  # the official questions say nothing that the rows do not
    images_from = COCO_IMAGES

    def annotations(self) -> Splits:
        """The rows of each split; questions that are both trained on and evaluated are logged."""
        splits = super().annotations()
        trained_on = {_question(row) for row in splits.get("train", ())}
        for split, rows in splits.items():
            leaked = 0 if split == "train" else sum(_question(row) in trained_on for row in rows)
            if leaked:
                logging.warning(
                    "%d of %d questions of %s are trained on as well: its accuracy says nothing; LAVIS's coco_vqa is "
                    "like that by default: use vqav2, or set build_info.annotations.train.storage",
                    leaked,
                    len(rows),
                    split,
                )
        return splits

    def read(self, split: str, paths: List[Path]) -> List[Annotation]:
        """Rows with their answers as a list."""
        if split == "train":
            rows = [self.row(row) for path in paths for row in self.rows(path)]
            ids = [row.get("question_id") for row in rows]
            if len(set(ids)) < len(ids):  # what is trained on is never looked up
                rows = [{**row, "question_id": None} for row in rows]
            return rows
        rows = [self.row(row) for row in self.rows(paths[0])]
        return _with_official(rows, paths[3]) if len(paths) > 3 else rows

    def rows(self, path: Path) -> List[Annotation]:
        """A file's rows."""
        return read_rows(path)

    def row(self, row: Annotation) -> Annotation:
        """A row with ``answer`` as a list of texts, or without it."""
        answers = row.pop("answer", None)
        if answers is not None:
            row["answer"] = [answers] if isinstance(answers, str) else [str(answer) for answer in answers]
        return row

    def answer_list(self, splits: Splits) -> Optional[List[str]]:
        """The candidates for ranking: the evaluated split's list, else train's answers."""
        for split in splits:
            paths = [file.path for file in annotation_files(self.config) if file.split == split]
            if split != "train" and len(paths) > 1 and paths[1].is_file():
                return read_answer_list(str(paths[1]))
        return super().answer_list(splits)


def _question(row: Annotation) -> Tuple[Any, Any]:
    return row.get("image"), row.get("question")


def _with_official(rows: List[Annotation], path: Path) -> List[Annotation]:
    """Rows with the answers and types of a file in VQA's official layout."""
    official = {str(entry.get("question_id")): entry for entry in entries(path, "annotations", answer_text)}
    lost = [row.get("question_id") for row in rows if str(row.get("question_id")) not in official]
    if lost:
        raise BadDataError(f"{path}: no annotation for {len(lost)} of {len(rows)} questions, such as {lost[0]}")
    joined = []
    for row in rows:
        entry = official[str(row["question_id"])]
        image_id = {"image_id": entry["image_id"]} if "image_id" in entry else {}
        joined.append({**row, **image_id, **answers_of(entry, path)})
    return joined


class COCOVQA(LavisVQABuilder):
    """``coco_vqa``."""

    benchmark = "vqav2"


class OKVQA(LavisVQABuilder):
    """``ok_vqa``."""

    benchmark = "okvqa"


class AOKVQAEvalData(BenchmarkVQAEvalData):
    """A-OKVQA's direct answers, and its leaderboard's file."""

    def leaderboard_entries(self, answers: Dict[Any, str]) -> Any:
        """Direct answers alone, as LAVIS writes it (``tasks/vqa.py:261``)."""
        return {
            question_id: {"direct_answer": answer, "multiple_choice": ""} for question_id, answer in answers.items()
        }


class AOKVQA(LavisVQABuilder):
    """``aok_vqa``: its ten direct answers."""

    eval_dataset_cls = AOKVQAEvalData
    benchmark = "aokvqa"

    def row(self, row: Annotation) -> Annotation:
        """``direct_answers`` as the answers; test has none."""
        return super().row({**row, "answer": row.get("direct_answers")})


class GQAEvalData(BenchmarkVQAEvalData):
    """GQA's questions, and its server's file."""

    def leaderboard_entries(self, answers: Dict[Any, str]) -> Any:
        """As GQA's own evaluation code reads it."""
        return [{"questionId": str(question_id), "prediction": answer} for question_id, answer in answers.items()]


class GQA(LavisVQABuilder):
    """``gqa``: one answer a question. Beside LAVIS's files, those of the GQA site are read, which are objects by
    question id."""

    eval_dataset_cls = GQAEvalData
    benchmark = "gqa"
    optional_files = (1,)
    images_from = "get https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip, unpack it there"

    def rows(self, path: Path) -> List[Annotation]:
        """LAVIS's rows, or the official ones in the same form, with their structural type."""
        content = read_json(path)
        if not isinstance(content, dict):
            return rows_in(content, path)
        return [
            {
                "image": f"{entry.get('imageId')}.jpg",
                "question": entry.get("question"),
                "question_id": question_id,
                "question_type": (entry.get("types") or {}).get("structural", ""),
                "source": f"{path.name}, question {question_id}",
                **({"answer": entry["answer"]} if entry.get("answer") is not None else {}),
            }
            for question_id, entry in content.items()
        ]


class VGVQA(LavisVQABuilder):
    """``vg_vqa``: one answer a question, for training beside another set, with a fifth of the weight as in LAVIS."""

    benchmark = "vg"
    images_from = VG_IMAGES

    def row(self, row: Annotation) -> Annotation:
        """The weight of ``vg_vqa_datasets.py:32``."""
        return {**super().row(row), "weight": [0.2]}
