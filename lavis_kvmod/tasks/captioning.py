"""``kvmod_captioning``: finetune and evaluate captioning on any data set that has its captions."""

import logging
from typing import Any, Dict, List, Optional

from lavis.common.dist_utils import is_main_process
from lavis.tasks.captioning import CaptionTask

from lavis_kvmod.tasks.datasets import BuildsDatasets
from lavis_kvmod.tasks.evaluation import DatasetEvaluation, as_list, plain_id


class KVModCaptionTask(DatasetEvaluation, CaptionTask, BuildsDatasets):
    """LAVIS's captioning task with image ids of any type, scored against the data set's own captions."""

    @classmethod
    def setup_task(cls, cfg) -> "KVModCaptionTask":
        """Build from LAVIS's config, with its recipes' values as defaults."""
        run = cfg.run_cfg
        return cls(
            num_beams=run.get("num_beams", 5),
            max_len=run.get("max_len", 30),
            min_len=run.get("min_len", 1),
            evaluate=run.get("evaluate", False),
            report_metric=run.get("report_metric", True),
        )

    def valid_step(self, model, samples) -> List[Dict[str, Any]]:
        """One caption for each image of a batch."""
        captions = model.generate(
            samples,
            use_nucleus_sampling=False,
            num_beams=self.num_beams,
            max_length=self.max_len,
            min_length=self.min_len,
        )
        return [
            {"instance_id": instance, "image_id": plain_id(image_id), "caption": caption}
            for instance, image_id, caption in zip(samples["instance_id"], samples["image_id"], captions)
        ]

    def after_evaluation(self, val_result, split_name, epoch, **kwargs) -> Optional[dict]:
        """``exact_match`` in per cent: captions that equal a reference, case and spacing aside (rank 0)."""
        rows = self.gather_predictions(val_result, split_name, epoch)
        if not is_main_process():
            return None
        annotations = self.annotations()
        if not self.report_metric:
            return {"agg_metrics": 0.0}
        if any("caption" not in annotations[row["instance_id"]] for row in rows):
            logging.warning("%s has no captions: predictions are written, not scored", split_name)
            return {}
        hits = [
            _plain(row["caption"]) in map(_plain, as_list(annotations[row["instance_id"]]["caption"])) for row in rows
        ]
        exact_match = 100 * sum(hits) / len(hits)
        return {"exact_match": exact_match, "agg_metrics": exact_match}


def _plain(caption: str) -> str:
    return " ".join(caption.lower().split())
