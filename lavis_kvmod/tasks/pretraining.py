"""``kvmod_pretrain``: stage 1's objectives, or stage 2's captions, on data sets of images with texts."""

import logging
from typing import Any, Dict, Mapping

import torch
from lavis.datasets.data_utils import prepare_sample

from lavis_kvmod.system.distributed import gather
from lavis_kvmod.system.progress import Progress
from lavis_kvmod.tasks.datasets import BuildsDatasets

__all__ = ["KVModPretrainTask"]


class KVModPretrainTask(BuildsDatasets):
    """LAVIS's ``image_text_pretrain``, with a validation: the mean of each loss; lower is better."""

    target = "caption"

    def before_evaluation(self, model: Any, dataset: Any, **kwargs: Any) -> None:
        """Nothing to prepare: the losses need no ground truth but the texts."""

    @torch.no_grad()
    def evaluation(self, model: Any, data_loader: Any, cuda_enabled: bool = True) -> Dict[str, float]:
        """The sums of this rank's losses, each batch's times its samples, and the number of samples."""
        sums: Dict[str, float] = {"samples": 0.0}
        for samples in Progress(data_loader, "evaluating"):
            samples.pop("bad_samples", None)
            samples = prepare_sample(samples, cuda_enabled=cuda_enabled)
            count = len(samples["image"])
            for name, value in _losses(model(samples)).items():
                sums[name] = sums.get(name, 0.0) + count * value
            sums["samples"] += count
        return sums

    def after_evaluation(self, val_result: Dict[str, float], split_name: str, **kwargs: Any) -> Dict[str, float]:
        """The mean losses; ``agg_metrics`` is the whole loss with its sign turned: runners keep what has the most."""
        shares = gather([val_result])
        samples = sum(share["samples"] for share in shares)
        names = dict.fromkeys(name for share in shares for name in share if name != "samples")
        means = {name: sum(share.get(name, 0.0) for share in shares) / samples for name in names}
        logging.info("%s: %s", split_name, ", ".join(f"{name} {value:.4f}" for name, value in means.items()))
        return {**means, "agg_metrics": -means["loss"]}


def _losses(output: Mapping[str, Any]) -> Dict[str, float]:
    """``loss`` and the objectives' own, as far as a model has them."""
    return {name: float(value) for name, value in output.items() if name.startswith("loss") and name != "loss_weight"}
