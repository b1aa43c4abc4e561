"""What both tasks share in evaluation: predictions by instance, gathered over ranks, scored against the data set."""

import json
import logging
from pathlib import Path
from typing import Any, Dict, List

from lavis.common.dist_utils import is_main_process
from lavis.common.registry import registry
from lavis.datasets.data_utils import prepare_sample

from lavis_kvmod.distributed import gather
from lavis_kvmod.progress import Progress


class DatasetEvaluation:
    """Mix-in for LAVIS tasks: the ground truth is the data set's own ``annotation``.

    A prediction is a dict with the sample's ``instance_id``; LAVIS's data sets put the same id on the annotation it
    came from, so ids of questions and images may be of any type.
    """

    def before_evaluation(self, model, dataset, **kwargs) -> None:
        """Remember which data set is being evaluated."""
        super().before_evaluation(model, dataset, **kwargs)
        self._dataset = dataset

    def evaluation(self, model, data_loader, cuda_enabled: bool = True) -> List[Dict[str, Any]]:
        """This rank's predictions."""
        results = []
        for samples in Progress(data_loader, "evaluating"):
            samples = prepare_sample(samples, cuda_enabled=cuda_enabled)
            results.extend(self.valid_step(model=model, samples=samples))
        return results

    def gather_predictions(self, results, split_name: str, epoch) -> List[Dict[str, Any]]:
        """The predictions of all ranks, each instance once; rank 0 also writes them to ``result/``."""
        unique = {row["instance_id"]: row for row in gather(results)}
        rows = list(unique.values())
        if is_main_process():
            path = Path(registry.get_path("result_dir")) / f"{split_name}_epoch{epoch}.json"
            path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
            logging.info("wrote %s predictions to %s", len(rows), path)
        return rows

    def annotations(self) -> Dict[str, Dict[str, Any]]:
        """The evaluated data set's annotations by instance id."""
        return {ann["instance_id"]: ann for ann in self._dataset.annotation}


def plain_id(value) -> Any:
    """An id as JSON can hold it: a collated tensor becomes a number."""
    return value.item() if hasattr(value, "item") else value


def as_list(value) -> List[str]:
    """One answer or caption, or many, as a list."""
    return [value] if isinstance(value, str) else list(value)
