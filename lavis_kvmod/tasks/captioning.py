"""``kvmod_captioning``: finetune and evaluate captioning on any data set that has its captions."""

import logging
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple

from lavis.tasks.captioning import CaptionTask

from lavis_kvmod.system.text_cleaning import one_line
from lavis_kvmod.tasks.caption_metrics import METRICS, CaptionScores, aggregate, score_captions
from lavis_kvmod.tasks.datasets import BuildsDatasets
from lavis_kvmod.tasks.evaluation import DatasetEvaluation, Row, decoding_of, known_to, plain_id, unscored
from lavis_kvmod.tasks.ground_truth import captions_of
from lavis_kvmod.tasks.predictions import confidence
from lavis_kvmod.tasks.settings import CaptioningSettings


class KVModCaptionTask(DatasetEvaluation, CaptionTask, BuildsDatasets):
    """LAVIS's captioning task with image ids of any type, scored against the data set's own captions.

    Args:
        caption_metrics: which of `lavis_kvmod.tasks.caption_metrics.METRICS` to compute.
        valid_loss: also compute the mean loss, where evaluation batches carry a caption.
        decoding: more arguments of the model's ``generate``.
        **lavis: LAVIS's own arguments.
    """

    target = "caption"
    goodness = ("CIDEr", "ROUGE_L", "Bleu_4", "METEOR", "exact_match")

    def __init__(
        self,
        *,
        caption_metrics: Sequence[str] = METRICS,
        valid_loss: bool = True,
        decoding: Optional[Dict[str, Any]] = None,
        **lavis: Any,
    ):
        super().__init__(**lavis)
        self.decoding = decoding or {}
        self.caption_metrics = tuple(caption_metrics)
        self.valid_loss = valid_loss
        self._told: Set[str] = set()

    @classmethod
    def setup_task(cls, cfg: Any) -> "KVModCaptionTask":
        """Build from LAVIS's config, with its recipes' values as defaults."""
        settings = CaptioningSettings.of(cfg.run_cfg)
        return cls(
            num_beams=settings.num_beams,
            max_len=settings.max_len,
            min_len=settings.min_len,
            evaluate=cfg.run_cfg.get("evaluate", False),
            report_metric=settings.report_metric,
            caption_metrics=settings.caption_metrics,
            valid_loss=settings.valid_loss,
            decoding=decoding_of(settings),
        )

    def has_targets(self, samples: Dict[str, Any]) -> bool:
        """Whether a batch carries captions, as our data sets' do."""
        return "text_input" in samples and all(text.strip() for text in samples["text_input"])

    def valid_step(self, model: Any, samples: Dict[str, Any]) -> List[Row]:
        """One caption for each image of a batch: of several (``num_captions``) the likeliest, where a model says."""
        captions = model.generate(
            samples,
            num_beams=self.num_beams,
            max_length=self.max_len,
            min_length=self.min_len,
            **known_to(model.generate, return_scores=True, **self.decoding),
        )
        each = len(captions) // len(samples["image_id"])
        captions = [_likeliest(captions[i : i + each]) for i in range(0, len(captions), each)]
        return [
            {
                "instance_id": instance,
                "image_id": plain_id(image_id),
                "caption": getattr(caption, "answer", caption),
                **(confidence(caption) if hasattr(caption, "log_prob") else {}),
            }
            for instance, image_id, caption in zip(samples["instance_id"], samples["image_id"], captions)
        ]

    def score(self, rows: List[Row], annotations: List[Row]) -> Tuple[List[Row], Dict[str, Any]]:
        """COCO's metrics in LAVIS's units, and ``exact_match`` in per cent; by image, against all its captions.

        An image that several instances show is scored once, by the first one's caption.
        """
        images = _by_image(rows, annotations)
        references = [
            list(dict.fromkeys(c for i in of_image for c in captions_of(annotations[i]))) for of_image in images
        ]
        rows = list(rows)
        for of_image, captions in zip(images, references):
            for i in of_image:
                rows[i] = _complete(rows[i], annotations[i], captions)
        if not self.report_metric:
            return rows, unscored()

        known = [(of_image[0], captions) for of_image, captions in zip(images, references) if captions]
        if not known:
            return rows, unscored()
        if len(known) < len(images):
            logging.warning(
                "%d of %d images have no captions and were not scored", len(images) - len(known), len(images)
            )
        firsts, truths = zip(*known)
        scores = score_captions([rows[i]["caption"] for i in firsts], truths, self.caption_metrics)
        self._tell(scores)
        for n, (i, captions) in enumerate(known):
            rows[i]["exact_match"] = _is_exact(rows[i]["caption"], captions)
            rows[i].update({name: values[n] for name, values in scores.by_image.items()})
        exact_match = 100 * sum(rows[i]["exact_match"] for i in firsts) / len(firsts)
        agg_metrics = aggregate(scores.metrics)
        return rows, {
            **scores.metrics,
            "exact_match": exact_match,
            "agg_metrics": exact_match / 100 if agg_metrics is None else agg_metrics,
            "scored": len(firsts),
            "tokeniser": scores.tokeniser,
            **({"left_out": _left_out(scores)} if scores.left_out else {}),
        }

    def _tell(self, scores: CaptionScores) -> None:
        """Say once a run what is left out and why."""
        for line in [*([f"left out {_left_out(scores)}"] if scores.left_out else []), *scores.notes]:
            if line not in self._told:
                logging.warning("caption metrics: %s", line)
                self._told.add(line)


def _likeliest(captions: Sequence[Any]) -> Any:
    return max(captions, key=lambda caption: getattr(caption, "log_prob", 0.0))


def _left_out(scores: CaptionScores) -> str:
    """The metrics that are not there, and why."""
    by_reason: Dict[str, List[str]] = {}
    for name, reason in scores.left_out.items():
        by_reason.setdefault(reason, []).append(name)
    return "; ".join(f"{' and '.join(names)}: {reason}" for reason, names in by_reason.items())


def _by_image(rows: List[Row], annotations: List[Row]) -> List[List[int]]:
    """Places of the rows that show the same image, in the order the images come."""
    groups: Dict[Any, List[int]] = {}
    for i, (row, annotation) in enumerate(zip(rows, annotations)):
        # LAVIS's COCO set makes an id of the file name's end, which other files may share; its annotation has the name.
        key = next((annotation[k] for k in ("image_id", "image") if annotation.get(k) is not None), row["image_id"])
        groups.setdefault((type(key).__name__, key), []).append(i)
    return list(groups.values())


def _complete(row: Row, annotation: Row, references: List[str]) -> Row:
    """A row as it is written: LAVIS's keys, and what one wants to know beside the prediction."""
    return {
        "instance_id": row["instance_id"],
        "image_id": row["image_id"],
        "image": plain_id(annotation.get("image", row["image_id"])),
        "references": references,
        "prediction": row["caption"],
        **{key: value for key, value in row.items() if key not in ("instance_id", "image_id")},
    }


def _is_exact(caption: str, references: Sequence[str]) -> bool:
    return _plain(caption) in map(_plain, references)


def _plain(caption: str) -> str:
    return one_line(caption).lower()
