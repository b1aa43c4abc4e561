"""Retrieval: the same scores as LAVIS's compute_sim_matrix, with the best alone kept and in blocks."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lavis.models.blip2_models.blip2_qformer import Blip2Qformer
from omegaconf import OmegaConf
from small_vit import SIZE
from stage_1 import make_stock, make_tokenizer, ours_like

from lavis_kvmod.commands.train import train
from lavis_kvmod.models.settings import Stage1Settings
from lavis_kvmod.tasks import retrieval, retrieval_scores
from lavis_kvmod.tasks.retrieval_scores import Best, recall

TEXTS = [
    f"a {ink} {digit} on {paper} paper"
    for ink in ("red", "blue")
    for digit in ("one", "two")
    for paper in ("pink", "sky")
]
IMAGES = torch.randn(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return make_stock(Blip2Qformer, make_tokenizer(tmp_path_factory.mktemp("words"))).eval()


def batches(size=4):
    def read(what):
        for start in range(0, len(IMAGES), size):
            yield {"image": IMAGES[start : start + size], "index": torch.arange(len(IMAGES))[start : start + size]}

    return read


def dense(best, columns):
    """As LAVIS gives scores: a matrix, -100 where nothing was kept."""
    full = torch.full((len(best.numbers), columns), -100.0)
    for row, (scores, index) in enumerate(zip(best.scores, best.numbers)):
        full[row, index[index >= 0]] = scores[index >= 0]
    return full


@pytest.mark.parametrize("texts_at_once", [3, 4096])
def test_scores_are_lavis(stock, monkeypatch, texts_at_once):
    monkeypatch.setattr(retrieval_scores, "_TEXTS_AT_ONCE", texts_at_once)
    monkeypatch.setattr(retrieval, "_PAIRS_A_BATCH", 5)

    class Loader:
        dataset = SimpleNamespace(text=TEXTS, image=range(len(IMAGES)))

        def __iter__(self):
            return iter([{"image": IMAGES[:4]}, {"image": IMAGES[4:]}])

    with torch.no_grad():
        i2t, t2i = stock.compute_sim_matrix(Loader(), SimpleNamespace(k_test=3))
        ours = ours_like(stock).eval()
        found = retrieval.retrieve(ours, TEXTS, len(IMAGES), batches(), k_test=3)["itm"]
        for matrix, expected in zip(ours.compute_sim_matrix(Loader(), SimpleNamespace(k_test=3)), (i2t, t2i)):
            assert abs(matrix - expected).max() <= 1e-5  # as LAVIS's own task is given them
    assert (dense(found.texts, len(TEXTS)) - torch.as_tensor(i2t)).abs().max() <= 1e-5
    assert (dense(found.images, len(IMAGES)) - torch.as_tensor(t2i)).abs().max() <= 1e-5
    assert (found.texts.scores.diff(dim=1) <= 0).all() and (found.images.scores.diff(dim=1) <= 0).all()


def test_without_matching_the_contrastive_order_stands(stock):
    ours = ours_like(stock).eval()
    found = retrieval.retrieve(ours, TEXTS, len(IMAGES), batches(), k_test=0)
    assert found["itm"] is None
    with torch.no_grad():
        image = ours.image_features(ours.features({"image": IMAGES}))
        scores = retrieval_scores.similarity(image, ours.text_features(ours.tokenise(TEXTS)))
    assert torch.equal(found["itc"].texts.numbers, scores.argsort(dim=1, descending=True, stable=True))
    assert torch.equal(found["itc"].images.numbers, scores.t().argsort(dim=1, descending=True, stable=True))


def test_the_best_of_many_blocks_are_the_best_of_all():
    scores = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    best = Best.none(5, 7)
    for start in range(0, 40, 6):
        best = best.with_more(scores[:, start : start + 6], torch.arange(40)[start : start + 6])
    expected = scores.topk(7, dim=1)
    assert torch.equal(best.numbers, expected.indices) and torch.equal(best.scores, expected.values)


def test_recall_counts_any_right_candidate_and_asks_no_row_without_one():
    found = Best(torch.zeros(3, 3), torch.tensor([[4, 2, 0], [1, 3, 2], [0, 1, 2]]))
    assert recall(found, [{0, 9}, {3}, set()], (1, 2, 3)) == [0.0, 50.0, 100.0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["coco_retrieval", "flickr30k"])
def test_lavis_own_sets_are_evaluated(benchmarks, model_config, tmp_path, name):
    """LAVIS's builders, files and lists, in our task and runner."""
    sizes = {key: value for key, value in model_config().items() if key in Stage1Settings.model_fields}
    sizes.update(arch="blip2_kvmod", bert_model="demo", from_bert=False, finetuned=None, pretrained=None)
    annotations = benchmarks / "coco/annotations"
    files = {split: str(annotations / f"coco_karpathy_{split}.json") for split in ("train", "val", "test")}
    build = {
        "images": {"storage": str(benchmarks / "coco/images")},
        "annotations": {split: {"storage": path} for split, path in files.items()},
    }
    processors = {mode: {"name": "blip_image_eval", "image_size": SIZE} for mode in ("train", "eval")}
    run = {"task": "kvmod_retrieval", "device": "cpu", "num_workers": 0, "batch_size_train": 2, "batch_size_eval": 2}
    run.update(max_epoch=1, k_test=16, train_splits=["train"], test_splits=["test"], output_dir=str(tmp_path / "out"))
    config = {
        "model": {**{k: str(v) if isinstance(v, Path) else v for k, v in sizes.items()}, "load_finetuned": False},
        "datasets": {name: {"build_info": build, "vis_processor": processors}},
        "run": run,
    }
    OmegaConf.save(OmegaConf.create(config), tmp_path / "run.yaml")
    metrics = train(str(tmp_path / "run.yaml"))["test"]
    assert {"txt_r1", "img_r10", "itc_txt_r1", "r_mean", "agg_metrics"} <= set(metrics)
    assert metrics["txt_r10"] == metrics["img_r10"] == 100  # a handful of photographs
