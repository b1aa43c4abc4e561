"""What the benchmarks of questions share: annotators who said nothing, and the file that an evaluation server takes."""

import json
import logging
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence

from lavis_kvmod.datasets.annotated import Annotation, VQAEvalData
from lavis_kvmod.datasets.builder import Problem, VQABuilder
from lavis_kvmod.weights.files import whole_or_nothing

__all__ = ["BenchmarkVQABuilder", "BenchmarkVQAEvalData"]


class BenchmarkVQAEvalData(VQAEvalData):
    """Questions by id, and the leaderboard's file: evaluation hands its answers to `write_leaderboard`.

    Attributes:
        benchmark, split: the file's name is made of; set by the builder.
    """

    benchmark = "vqa"
    split = "test"

    def write_leaderboard(self, rows: Sequence[Mapping[str, Any]], folder: Path) -> Path:
        """Write ``<benchmark>_<split>_leaderboard.json``, what the benchmark's server and official code take.

        Args:
            rows: ``question_id`` and ``answer`` of each question.
            folder: where to write.

        Returns:
            The file's path. Questions without an answer are logged: the server refuses such a file.
        """
        answers = {str(row["question_id"]): str(row["answer"]) for row in rows}
        ids = [row["question_id"] for row in self.annotation if str(row["question_id"]) in answers]
        path = Path(folder) / f"{self.benchmark}_{self.split}_leaderboard.json"
        with whole_or_nothing(path) as temporary:
            entries = self.leaderboard_entries({question_id: answers[str(question_id)] for question_id in ids})
            temporary.write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")
        if len(ids) < len(self.annotation):
            logging.warning(
                "%s answers %d of %d questions: the evaluation server wants all", path, len(ids), len(self.annotation)
            )
        return path

    def leaderboard_entries(self, answers: Dict[Any, str]) -> Any:
        """What the file holds, from question ids, as the data set has them, and their answers."""
        return [{"question_id": question_id, "answer": answer} for question_id, answer in answers.items()]


class BenchmarkVQABuilder(VQABuilder):
    """A builder whose data sets know which benchmark and split they are.

    Attributes:
        benchmark: its name, as in the leaderboard's file.
    """

    eval_dataset_cls = BenchmarkVQAEvalData
    benchmark: str

    def row_problem(self, row: Annotation, needs_target: bool) -> Optional[Problem]:
        """As for any questions, but an annotator may have said nothing, if others did."""
        spoken = [answer for answer in row.get("answer") or [] if answer.strip()]
        return super().row_problem({**row, "answer": spoken}, needs_target)

    def build(self) -> Dict[str, Any]:
        """The data sets by split, each knowing whose it is."""
        datasets = super().build()
        for split, dataset in datasets.items():
            dataset.benchmark, dataset.split = self.benchmark, split
        return datasets
