"""What both tasks share in evaluation: predictions by instance, gathered over ranks, scored against the data set."""

import inspect
import logging
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from lavis.common.dist_utils import is_main_process
from lavis.common.registry import registry
from lavis.datasets.data_utils import prepare_sample
from lavis.tasks.base_task import BaseTask
from torch import Tensor

from lavis_kvmod.datasets.bad_samples import BadSampleCounter
from lavis_kvmod.system.distributed import gather, get_world_size
from lavis_kvmod.system.progress import Progress
from lavis_kvmod.tasks.batches import steps
from lavis_kvmod.tasks.predictions import write_predictions
from lavis_kvmod.tasks.settings import GenerationSettings

Row = Dict[str, Any]

# Keys of the run section that models know by the same names, beside the lengths and beams of LAVIS's tasks.
DECODING = ("length_penalty", "repetition_penalty", "use_nucleus_sampling", "top_p", "temperature", "num_captions")

# Streamed images cannot be asked for again, so the first ones, on all ranks together, are kept for a report's examples.
PICTURES_KEPT = 96


class Evaluated(NamedTuple):
    """What is left of an evaluation, for a report: the rows as written, the data set, images by instance id where
    they were streamed, and the row keys that say how good a row is, the best one first."""

    rows: List[Row]
    dataset: Any
    pictures: Dict[str, Tensor]
    goodness: Sequence[str]


class DatasetEvaluation(BaseTask):
    """Stands in front of a LAVIS task among a class's bases: the ground truth is the data set's own ``annotation``.

    A prediction is a dict with the sample's ``instance_id``; LAVIS's data sets put the same id on the annotation it
    came from, so ids of questions and images may be of any type. Streamed data sets, which have no list of
    annotations, send each sample's along in the batch, under ``annotation``.

    A task gives `valid_step` (LAVIS's: one prediction a sample, in order), `has_targets` and `score`.

    Attributes:
        valid_loss: also compute the mean loss, where batches carry the targets.
        evaluated: set this to a dict to be given there, by split, what evaluations leave (rank 0).
        goodness: the keys in the rows that say how good one is, the best one first.
    """

    valid_loss = True
    goodness: Sequence[str] = ()
    evaluated: Optional[Dict[str, Evaluated]] = None
    _dataset: Any = None
    _loss: Tuple[float, float] = (0.0, 0.0)  # sum of weighted losses, sum of weights

    def __init__(self, **lavis: Any):
        super().__init__(**lavis)
        self._bad: List[str] = []
        self._pictures: Dict[str, Tensor] = {}

    def has_targets(self, samples: Dict[str, Any]) -> bool:
        """Whether a batch carries what a loss needs."""
        raise NotImplementedError

    def score(self, rows: List[Row], annotations: List[Row]) -> Tuple[List[Row], Dict[str, Any]]:
        """Predictions and their annotations -> rows to be written, and metrics with ``agg_metrics`` and ``scored``."""
        raise NotImplementedError

    def before_evaluation(self, model: Any, dataset: Any, **kwargs: Any) -> None:
        """Remember which data set is being evaluated."""
        super().before_evaluation(model, dataset, **kwargs)
        self._dataset = dataset

    @torch.no_grad()
    def evaluation(self, model: Any, data_loader: Any, cuda_enabled: bool = True) -> List[Row]:
        """This rank's predictions; what else it learns on the way (loss, bad samples) is kept for
        `after_evaluation`."""
        self._loss, self._bad, self._pictures = (0.0, 0.0), [], {}
        results: List[Row] = []
        for step in steps(data_loader, Progress(data_loader, "evaluating"), model, self.has_targets):
            samples = step.samples
            bad, annotations = samples.pop("bad_samples", []), samples.pop("annotation", None)
            samples = prepare_sample(samples, cuda_enabled=cuda_enabled)
            wants_loss = self.valid_loss and step.all_have_targets
            if wants_loss and hasattr(model, "encoded"):  # once for both
                samples = model.encoded(samples)
            rows = self.valid_step(model=model, samples=samples)
            loss = self._weighted_loss(model, samples) if wants_loss else (0.0, 0.0)
            if not step.counts:
                continue
            if annotations is not None:
                rows = [{**row, "annotation": annotation} for row, annotation in zip(rows, annotations)]
                self._keep_pictures(rows, samples)
            results += rows
            self._bad += bad
            self._loss = (self._loss[0] + loss[0], self._loss[1] + loss[1])
        return results

    def after_evaluation(
        self, val_result: List[Row], split_name: str, epoch: Any = None, **kwargs: Any
    ) -> Optional[Dict[str, Any]]:
        """Score all ranks' predictions, write them to ``result/`` and return the metrics (rank 0, else None).

        Raises:
            BadDataError: on all ranks, if more samples were unreadable than the data set allows.
        """
        share = {"rows": val_result, "loss": self._loss, "bad": self._bad, "pictures": self._pictures}
        shares = gather([share])
        rows = self._in_order(row for share in shares for row in share["rows"])
        bad = list(dict.fromkeys(text for share in shares for text in share["bad"]))
        self._count_bad(len(rows) + len(bad), bad, epoch)  # a row that stood in for a bad one is there once
        if not is_main_process():
            return None
        annotations = self._annotations(rows)
        rows, metrics = self.score(rows, annotations)
        total, weight = (sum(values) for values in zip(*(share["loss"] for share in shares)))
        if weight > 0:
            metrics["loss"] = total / weight
        if metrics["scored"] == 0:
            logging.warning(
                "%s: nothing was scored (the data set has no ground truth, or report_metric is false); predictions are "
                "written, and agg_metrics is 0 only because LAVIS's runners ask for a number",
                split_name,
            )
        folder = Path(registry.get_path("result_dir"))
        paths = write_predictions(rows, folder, f"{split_name}_epoch{epoch}")
        logging.info("wrote %d predictions to %s and %s", len(rows), *paths)
        self._write_leaderboard(rows, folder)
        if self.evaluated is not None:
            pictures = {instance: image for share in shares for instance, image in share["pictures"].items()}
            self.evaluated[split_name] = Evaluated(rows, self._dataset, pictures, self.goodness)
        return metrics

    # ------------------------------------------------------------ while the batches pass

    def _weighted_loss(self, model: Any, samples: Dict[str, Any]) -> Tuple[float, float]:
        """A batch's loss times its weight, and that weight; random numbers are drawn as if it had not been."""
        device = samples["image"].device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            output = model(self.as_trained(model, dict(samples)))
        # Another model than ours does not say over how many tokens its mean is: then each sample counts the same.
        weight = float(output.get("loss_weight", len(_images(samples))))
        return float(output["loss"]) * weight, weight

    def as_trained(self, model: Any, samples: Dict[str, Any]) -> Dict[str, Any]:
        """An evaluation batch as the training loss sees it."""
        return samples

    def _keep_pictures(self, rows: List[Row], samples: Dict[str, Any]) -> None:
        if self.evaluated is None:
            return
        wanted = max(1, PICTURES_KEPT // get_world_size()) - len(self._pictures)
        for row, image in list(zip(rows, _images(samples)))[: max(0, wanted)]:
            self._pictures[row["instance_id"]] = side_by_side(image).to("cpu", torch.float16)

    # ------------------------------------------------------------ when all have passed

    def _in_order(self, rows: Iterable[Row]) -> List[Row]:
        """Each instance once, in the data set's order (streamed ones by their ids), however many ranks there were."""
        unique = {row["instance_id"]: row for row in rows}
        place = {ann["instance_id"]: i for i, ann in enumerate(getattr(self._dataset, "annotation", None) or [])}
        return sorted(unique.values(), key=lambda row: (place.get(row["instance_id"], len(place)), row["instance_id"]))

    def _annotations(self, rows: List[Row]) -> List[Row]:
        """Each row's annotation: the one that came with it (taken out of the row), else the data set's."""
        if any("annotation" in row for row in rows):
            return [row.pop("annotation") for row in rows]
        by_instance = {ann["instance_id"]: ann for ann in self._dataset.annotation}
        return [by_instance[row["instance_id"]] for row in rows]

    def _count_bad(self, num_samples: int, bad: List[str], epoch: Any) -> None:
        share = getattr(self._dataset, "max_bad_share", None)
        log = logging.warning if is_main_process() else (lambda *args: None)
        counter = BadSampleCounter(log=log, **({} if share is None else {"max_share": share}))
        counter.update(num_samples, bad)
        counter.report(epoch)

    def _write_leaderboard(self, rows: List[Row], folder: Path) -> None:
        write = getattr(self._dataset, "write_leaderboard", None)
        if write is not None:
            logging.info("wrote the file for the leaderboard to %s", write(rows, folder))


def _images(samples: Dict[str, Any]) -> Tensor:
    """Each sample's image; a batch may have an image once for several samples."""
    return samples["image"][samples["image_index"]] if "image_index" in samples else samples["image"]


def side_by_side(image: Tensor) -> Tensor:
    """Several images of a sample, (k, 3, H, W), as one picture (3, H, k * W); one image (3, H, W) as it is."""
    return torch.cat(list(image), dim=-1) if image.ndim == 4 else image


def unscored() -> Dict[str, Any]:
    """The metrics where there was nothing to score against. LAVIS's runners ask for ``agg_metrics``; that ``scored``
    is 0 tells that it means nothing."""
    return {"agg_metrics": 0.0, "scored": 0}


def known_to(method: Callable, **wanted: Any) -> Dict[str, Any]:
    """Those of the ``wanted`` arguments that a model's method has: not all of LAVIS's models can say how sure they are
    (``return_scores``), or know all ways to search for a text."""
    known = inspect.signature(method).parameters
    return {name: value for name, value in wanted.items() if name in known}


def decoding_of(settings: GenerationSettings) -> Dict[str, Any]:
    """The keys of how a text is searched for that the run file sets, as arguments of a model's method: what it does not
    set is the model's own."""
    return {name: getattr(settings, name) for name in DECODING if name in settings.model_fields_set}


def plain_id(value: Any) -> Any:
    """An id as JSON can hold it: a collated tensor becomes a number, the names of several images one."""
    if isinstance(value, tuple):
        return " + ".join(map(str, value))
    return value.item() if hasattr(value, "item") else value
