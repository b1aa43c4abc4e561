"""``kvmod_retrieval``: texts for images and images for texts, by the contrastive score and by the matching head."""

import json
import logging
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set

import torch
from lavis.common.registry import registry
from lavis.datasets.data_utils import prepare_sample
from torch import Tensor

from lavis_kvmod.system.distributed import gather, get_rank
from lavis_kvmod.system.progress import Progress
from lavis_kvmod.tasks.datasets import BuildsDatasets
from lavis_kvmod.tasks.retrieval_scores import Best, compare, pairs_of_batch, recall
from lavis_kvmod.tasks.settings import RetrievalSettings
from lavis_kvmod.weights.files import whole_or_nothing

__all__ = ["KVModRetrievalTask", "Retrieved", "retrieve"]

# LAVIS's names: txt_… for texts that are found for images, img_… for images that are found for texts.
RECALLS = (1, 5, 10)
_TEXTS_A_BATCH = 256
_PAIRS_A_BATCH = 256


class Retrieved(NamedTuple):
    """The best texts of each image and the best images of each text."""

    texts: Best
    images: Best


class KVModRetrievalTask(BuildsDatasets):
    """Recall of a stage-1 model on a data set with LAVIS's lists: ``text``, ``img2txt`` and ``txt2img``.

    Args:
        k_test: how many of the best are ranked anew by the matching head; 0 for none.
    """

    target = "caption"

    def __init__(self, *, k_test: int = 128, **lavis: Any):
        super().__init__(**lavis)
        self.k_test = k_test
        self._dataset: Any = None

    @classmethod
    def setup_task(cls, cfg: Any) -> "KVModRetrievalTask":
        """Build from LAVIS's config."""
        return cls(k_test=RetrievalSettings.of(cfg.run_cfg).k_test)

    def before_evaluation(self, model: Any, dataset: Any, **kwargs: Any) -> None:
        """Remember which data set is being evaluated."""
        self._dataset = dataset

    @torch.no_grad()
    def evaluation(self, model: Any, data_loader: Any, cuda_enabled: bool = True) -> Dict[str, Any]:
        """What was found, by the contrastive score alone and ranked anew (None if ``k_test`` is 0)."""

        def batches(what: str) -> Iterator[Dict[str, Any]]:
            for samples in Progress(data_loader, what):
                yield prepare_sample(samples, cuda_enabled=cuda_enabled)

        dataset = data_loader.dataset
        return retrieve(model, list(dataset.text), len(dataset), batches, self.k_test)

    def after_evaluation(
        self, val_result: Dict[str, Any], split_name: str, epoch: Any = None, **kwargs: Any
    ) -> Dict[str, Any]:
        """Recalls at 1, 5 and 10 in per cent under LAVIS's names; ``itc_…`` are those of the contrastive score alone.

        ``agg_metrics`` is LAVIS's: the mean of the texts' recalls.
        """
        dataset = self._dataset
        contrastive, matched = val_result["itc"], val_result["itm"]
        metrics = recalls(matched or contrastive, dataset)
        if matched is not None:
            metrics.update({f"itc_{name}": value for name, value in recalls(contrastive, dataset).items()})
        metrics["agg_metrics"] = metrics["txt_r_mean"]
        logging.info("%s: %s", split_name, json.dumps(metrics))
        if get_rank() == 0:
            path = Path(registry.get_path("result_dir")) / f"{split_name}_epoch{epoch}.json"
            _write(path, matched or contrastive, dataset)
        return metrics


def retrieve(
    model: Any, texts: List[str], num_images: int, batches: Any, k_test: int
) -> Dict[str, Optional[Retrieved]]:
    """Compare all images with all texts.

    Args:
        model: a stage-1 model (`lavis_kvmod.models.blip2_kvmod.Blip2KVMod`).
        texts: the candidates.
        num_images: of all ranks together.
        batches: ``(what) -> iterator`` over this rank's images: dicts with ``image`` and ``index``, an image's number.
        k_test: how many of the best are ranked anew.

    Returns:
        ``itc``: by the contrastive score; ``itm``: by the sum of both scores, as LAVIS ranks (``compute_sim_matrix``),
        or None.
    """
    kept = max(k_test, *RECALLS)
    text_features = torch.cat([model.text_features(model.tokenise(block)) for block in _blocks(texts, _TEXTS_A_BATCH)])
    of_images = Best.none(num_images, min(kept, len(texts)))
    of_texts = Best.none(len(texts), min(kept, num_images))
    for samples in batches("comparing"):
        index = _numbers(samples)
        scores = torch.cat(list(compare(model.image_features(model.features(samples)), text_features)), dim=1)
        best = Best.none(len(index), of_images.numbers.shape[1]).with_more(scores, torch.arange(len(texts)))
        of_images.scores[index], of_images.numbers[index] = best
        of_texts = of_texts.with_more(scores.t(), index)
    contrastive = _of_all_ranks(of_images, of_texts)
    if not k_test:
        return {"itc": contrastive, "itm": None}
    return {"itc": contrastive, "itm": _rank_anew(model, texts, contrastive, batches, k_test)}


def _rank_anew(model: Any, texts: List[str], found: Retrieved, batches: Any, k_test: int) -> Retrieved:
    """Add the matching head's logit to the scores of the ``k_test`` best; images pass once more."""
    first = Retrieved(*(Best(best.scores[:, :k_test], best.numbers[:, :k_test]) for best in found))
    of_images, of_texts = Best.none(*first.texts.numbers.shape), Best.none(*first.images.numbers.shape)
    for samples in batches("matching"):
        index, features = _numbers(samples), model.features(samples)
        rows = Best(first.texts.scores[index], first.texts.numbers[index])
        pairs = pairs_of_batch(index.tolist(), rows, first.images)
        for block in _blocks(range(len(pairs.image)), _PAIRS_A_BATCH):
            image, text = pairs.image[list(block)], pairs.text[list(block)]
            chosen = type(features)(*(None if part is None else part[image.to(part.device)] for part in features))
            logits = model.match(chosen, model.tokenise([texts[t] for t in text.tolist()]))[:, 1].float().cpu()
            _put(of_images, first.texts, index[image], text, logits)
            _put(of_texts, first.images, text, index[image], logits)
    return _of_all_ranks(*(Best.none(*best.numbers.shape).with_more(*best) for best in (of_images, of_texts)))


def _put(into: Best, first: Best, rows: Tensor, candidates: Tensor, logits: Tensor) -> None:
    """Where a row's best hold a candidate, its new score: the old one and the logit."""
    places = first.numbers[rows] == candidates[:, None]
    which, place = places.nonzero(as_tuple=True)
    at = rows[which], place
    into.scores[at] = first.scores[at] + logits[which]
    into.numbers[at] = candidates[which]


def recalls(found: Retrieved, dataset: Any) -> Dict[str, float]:
    """Recalls and their means, under LAVIS's names (``lavis/tasks/retrieval.py``)."""
    metrics = {}
    for name, best, right in (("txt", found.texts, dataset.img2txt), ("img", found.images, dataset.txt2img)):
        values = recall(best, [_as_set(right.get(row)) for row in range(len(best.numbers))], RECALLS)
        metrics.update({f"{name}_r{k}": value for k, value in zip(RECALLS, values)})
        metrics[f"{name}_r_mean"] = sum(values) / len(values)
    metrics["r_mean"] = (metrics["txt_r_mean"] + metrics["img_r_mean"]) / 2
    return metrics


def _as_set(numbers: Any) -> Set[int]:
    if numbers is None:
        return set()
    return {int(numbers)} if isinstance(numbers, int) else {int(number) for number in numbers}


def _numbers(samples: Dict[str, Any]) -> Tensor:
    return torch.as_tensor(samples["index"]).cpu().long()


def _blocks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _of_all_ranks(of_images: Best, of_texts: Best) -> Retrieved:
    """Each image was seen by one rank; the best images of a text may be of several."""
    shares = gather([(of_images, of_texts)])
    images, texts = shares[0]
    for other_images, other_texts in shares[1:]:
        images, texts = images.with_more(*other_images), texts.with_more(*other_texts)
    return Retrieved(images, texts)


def _write(path: Path, found: Retrieved, dataset: Any) -> None:
    """The ten best of each, as JSON."""
    names = list(getattr(dataset, "image", None) or range(len(found.texts.numbers)))
    texts = list(dataset.text)
    rows = {
        "texts_of_images": [
            {"image": names[i], "texts": [texts[t] for t in row if t >= 0]}
            for i, row in enumerate(found.texts.numbers[:, : max(RECALLS)].tolist())
        ],
        "images_of_texts": [
            {"text": texts[t], "images": [names[i] for i in row if i >= 0]}
            for t, row in enumerate(found.images.numbers[:, : max(RECALLS)].tolist())
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_or_nothing(path) as temporary:
        temporary.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
