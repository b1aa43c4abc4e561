"""``lavis-kvmod embed``: the features of a split's images and texts, by a stage-1 model, in a file.

Under ``torchrun`` the ranks share the batches, and rank 0 writes. A batch holds the same images as in one process.
"""

import argparse
import os
import sys
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Sequence

import torch
from torch import Tensor

from lavis_kvmod.commands.launch import TOLD, ready, seed_everything, set_up_logging, weights_named
from lavis_kvmod.config.loading import KVModConfig, load_config
from lavis_kvmod.datasets.bad_samples import BadDataError
from lavis_kvmod.datasets.cells import said
from lavis_kvmod.models.settings import STAGE_1_ARCHS
from lavis_kvmod.system.distributed import gather, get_rank, get_world_size, init_distributed, leaves_group, on_main
from lavis_kvmod.system.paths import expanded
from lavis_kvmod.system.precision import amp_dtype, autocast
from lavis_kvmod.system.progress import Progress
from lavis_kvmod.tasks.embedding import (
    TEXTS_A_BATCH,
    Features,
    embed_images,
    embed_texts,
    require_kind,
    write_features,
)


class Loaded(NamedTuple):
    """A run file's model, on its device and ready to evaluate, and its data sets by split."""

    cfg: KVModConfig
    model: Any
    datasets: Dict[str, Any]

    def autocast(self) -> Any:
        """The precision that the run file asks for."""
        device = torch.device(self.cfg.run_cfg.device).type
        return autocast(device, amp_dtype(self.cfg.run_cfg.get("amp", False), device))


def load(cfg_path: str, options: Sequence[str], split: str) -> Loaded:
    """A stage-1 model and one split of its run file's data.

    Raises:
        ConfigurationError, CheckpointError, BadDataError: as a run of it would.
    """
    from lavis import tasks

    cfg = load_config(cfg_path, [*options, "run.evaluate=true", "run.valid_splits=[]", f"run.test_splits=[{split}]"])
    if cfg.model_cfg.arch not in STAGE_1_ARCHS:
        raise BadDataError(
            f"model.arch: expected {STAGE_1_ARCHS[0]}, which knows images and texts; got {cfg.model_cfg.arch}"
        )
    init_distributed(cfg.run_cfg)
    seed_everything(cfg.run_cfg.seed)
    task = tasks.setup_task(cfg)
    datasets = {s: d for splits in task.build_datasets(cfg).values() for s, d in splits.items()}
    return Loaded(cfg, ready(task.build_model(cfg), cfg.run_cfg.device), datasets)


def image_names(dataset: Any) -> List[str]:
    """What a data set's images are called, sample by sample.

    Raises:
        BadDataError: for one that is read as a stream.
    """
    if getattr(dataset, "image", None):
        return [str(name) for name in dataset.image]
    if not len(getattr(dataset, "annotation", ())):
        raise BadDataError(f"embed takes data sets with a list of annotations, got {type(dataset).__name__}")
    return [str(row.get("image_name") or row.get("image") or row["image_id"]) for row in dataset.annotation]


def texts_of(dataset: Any) -> List[str]:
    """A data set's texts, each once: those to be found, else its captions."""
    if hasattr(dataset, "text"):
        return list(dataset.text)
    told = [said(row, "caption") or () for row in dataset.annotation]
    texts = [text for texts in told for text in ([texts] if isinstance(texts, str) else texts)]
    return list(dict.fromkeys(map(dataset.text_processor, texts)))


def picture_of(dataset: Any, number: int) -> Any:
    """The picture of a sample, as it is."""
    from lavis_kvmod.datasets.images import read_image

    row = dataset.annotation[number]
    if hasattr(dataset, "picture"):
        return dataset.picture(row)
    return read_image(os.path.join(getattr(dataset, "vis_root", None) or "", row["image"]))


def _batches(loaded: Loaded, dataset: Any, numbers: Sequence[List[int]]) -> Iterator[Dict[str, Any]]:
    """Batches of these samples, on the model's device."""
    workers = int(loaded.cfg.run_cfg.num_workers)
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=numbers, num_workers=workers, collate_fn=dataset.collater
    )
    for samples in Progress(loader, "embedding"):
        yield {**samples, "image": samples["image"].to(loaded.model.device)}


def _by_all_ranks(count: int, size: int, features_of: Callable[[List[List[int]]], Tensor]) -> Tensor:
    """The features of ``count`` things in their order; of n ranks, each has computed those of every n-th batch."""
    batches = [list(range(start, min(start + size, count))) for start in range(0, count, size)]
    mine = batches[get_rank() :: get_world_size()]
    shares = gather([(mine, features_of(mine))])
    order = torch.tensor([number for numbers, _ in shares for batch in numbers for number in batch])
    return torch.cat([features for _, features in shares])[order.argsort()]


def embed(cfg_path: str, split: str, out: str, options: Sequence[str] = ()) -> Features:
    """Write a split's features to ``out``.

    Raises:
        ConfigurationError, CheckpointError, BadDataError, ValueError: see `load` and `write_features`.
    """
    path = expanded(out)
    require_kind(path)  # before the work
    loaded = load(cfg_path, options, split)
    dataset = loaded.datasets[split]
    names, texts = image_names(dataset), texts_of(dataset)
    model, size = loaded.model, int(loaded.cfg.run_cfg.batch_size_eval)
    with loaded.autocast():
        of_images = _by_all_ranks(len(dataset), size, lambda mine: embed_images(model, _batches(loaded, dataset, mine)))
        of_texts = _by_all_ranks(
            len(texts), TEXTS_A_BATCH, lambda mine: embed_texts(model, [texts[i] for batch in mine for i in batch])
        )
    about = {"split": split, "checkpoint": weights_named(loaded.cfg)}
    features = Features(names, of_images, texts, of_texts, about)
    on_main(lambda: write_features(path, features))
    return features


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--cfg-path", required=True, metavar="YAML", help="run file with a stage-1 model and the data")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of the run file")
    parser.add_argument("--split", default="test", metavar="NAME", help="which split (default: test)")
    parser.add_argument("--out", required=True, metavar="FILE", help="where to: a .parquet or .safetensors file")


def main(args: argparse.Namespace) -> int:
    """Run the command, and return its exit status."""
    set_up_logging()
    try:
        with leaves_group():
            features = embed(args.cfg_path, args.split, args.out, args.options)
            if get_rank() == 0:
                print(f"{args.out}: {len(features.images)} images, {len(features.texts)} texts")
    except (*TOLD, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
