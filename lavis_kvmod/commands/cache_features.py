"""``lavis-kvmod cache-features``: what the frozen encoders say of a run's images, written once for all its trainings.

    lavis-kvmod cache-features --cfg-path RUN.yaml --options model.feature_cache_dir=features

Under torchrun the processes share the work. What was interrupted goes on where it was.
"""

import argparse
import sys
from typing import Any, Dict, Iterator, List, Sequence

import torch
from torch.utils.data import DataLoader, Subset

from lavis_kvmod.commands.launch import load_config, ready, seed_everything, set_up_logging
from lavis_kvmod.datasets.loading.images import one_of_each_image
from lavis_kvmod.models.vision.feature_cache import TOGETHER, FrozenFeatureCache
from lavis_kvmod.models.vision.feature_files import FeatureFiles, FeatureFilesError, FeatureWriter
from lavis_kvmod.runners.epochs import on_device
from lavis_kvmod.system.distributed import get_rank, get_world_size, init_distributed, leaves_group, on_main
from lavis_kvmod.system.paths import absolute
from lavis_kvmod.system.precision import amp_dtype, autocast
from lavis_kvmod.system.progress import Progress
from lavis_kvmod.system.schema import ConfigurationError
from lavis_kvmod.weights.files import CheckpointError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--cfg-path", required=True, metavar="YAML", help="run file, with model.feature_cache_dir")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="override values of the run file")
    parser.add_argument("--splits", nargs="+", default=["train"], help="whose images (default: train)")


def main(args: argparse.Namespace) -> int:
    """Write the features; returns the exit status."""
    set_up_logging()
    try:
        with leaves_group():
            written = cache_features(args.cfg_path, args.options, args.splits)
    except (ConfigurationError, CheckpointError, FeatureFilesError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if get_rank() == 0:
        print(written)
    return 0


def cache_features(cfg_path: str, options: Sequence[str], splits: Sequence[str]) -> str:
    """Write the features of a run's splits; returns a line that says what is there now.

    Raises:
        ConfigurationError: for what is wrong with the run file.
        FeatureFilesError: if no folder is named, if images are augmented, or the folder holds another model's features.
    """
    from lavis import tasks

    cfg = load_config(cfg_path, options)
    if not cfg.model_cfg.get("feature_cache_dir"):
        raise FeatureFilesError(
            "model.feature_cache_dir: expected a folder to write to, got none; add "
            "--options model.feature_cache_dir=FOLDER"
        )
    folder = absolute(cfg.model_cfg.feature_cache_dir)
    cfg.model_cfg.feature_cache_dir = None  # what is there need not be whole
    init_distributed(cfg.run_cfg)
    seed_everything(cfg.run_cfg.seed)
    task = tasks.setup_task(cfg)
    datasets = task.build_datasets(cfg)
    model = task.build_model(cfg)
    own = model.fingerprint()
    device = torch.device(cfg.run_cfg.device)
    model = ready(model, device)
    on_main(lambda: FeatureWriter(folder, own).remove_damaged())
    writer = FeatureWriter(folder, own, get_rank())
    known = FeatureFiles(folder)
    with torch.no_grad(), autocast(device.type, amp_dtype(cfg.run_cfg.get("amp", False), device.type)):
        for split in splits:
            for batch in _images(datasets, split, int(cfg.run_cfg.num_workers)):
                new = {key: image for key, image in batch.items() if key not in known}
                if new:
                    _write(writer, model, new, device)
            writer.flush()
    on_main(lambda: None)  # all have written
    files = FeatureFiles(folder)
    size = sum(path.stat().st_size for path in folder.glob("features-*.safetensors"))
    return f"{folder}: features of {len(files):,} images, {size / max(len(files), 1) / 1e3:,.0f} KB each"


def _write(writer: FeatureWriter, model: Any, images: Dict[str, Any], device: torch.device) -> None:
    stacked = on_device(torch.stack(list(images.values())), device)
    # As a training encodes what it keeps: always as many together, so that no image depends on its company.
    writer.add(list(images), FrozenFeatureCache()(list(images), stacked, model._encode_to_keep))


def _images(datasets: Dict[str, Any], split: str, num_workers: int) -> Iterator[Dict[str, Any]]:
    """The images of a split by their keys, each once, this rank's share.

    Raises:
        FeatureFilesError: for a split that is nowhere, or whose images are augmented.
    """
    parts = [splits[split] for splits in datasets.values() if split in splits]
    if not parts:
        known = sorted({name for splits in datasets.values() for name in splits})
        raise FeatureFilesError(f"--splits: no data set has a split {split!r}; there are {', '.join(known)}")
    for dataset in parts:
        mine = one_of_each_image(dataset)[get_rank() :: get_world_size()]
        loader = DataLoader(Subset(dataset, mine), TOGETHER, num_workers=num_workers, collate_fn=_as_they_are)
        for samples in Progress(loader, f"features of {split}", log_every=50):
            if any("image_key" not in sample for sample in samples):
                raise FeatureFilesError(
                    f"split {split}: its image processor does not give the same pixels every time, so there is nothing "
                    "to keep; set its vis_processor to blip_image_eval"
                )
            yield dict(image for sample in samples for image in _keyed(sample))


def _keyed(sample: Dict[str, Any]) -> List[Any]:
    """A sample's image, or its images, each with its key."""
    key, image = sample["image_key"], sample["image"]
    return list(zip(key, image)) if isinstance(key, list) else [(key, image)]


def _as_they_are(samples: List[Any]) -> List[Any]:
    return samples


__all__ = ["add_arguments", "cache_features", "main"]
