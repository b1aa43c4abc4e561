"""``lavis-kvmod capfilt``: of noisy texts, and of those that a captioner writes, keep what fits the image."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Sequence

from lavis.common.registry import registry

from lavis_kvmod.commands.launch import TOLD, ready, seed_everything, set_up_logging, weights_named
from lavis_kvmod.config.checking import model_problems
from lavis_kvmod.config.loading import KVModConfig, load_config, read_config
from lavis_kvmod.datasets.bad_samples import BadDataError
from lavis_kvmod.datasets.shards.datasets import ShardDataset
from lavis_kvmod.datasets.shards.packing import Item, Packer, PackSettings, items_of
from lavis_kvmod.datasets.shards.rows import CAPTION
from lavis_kvmod.system.distributed import gather, get_rank, get_world_size, init_distributed, leaves_group, on_main
from lavis_kvmod.system.paths import expanded
from lavis_kvmod.system.progress import Progress
from lavis_kvmod.system.schema import ConfigurationError
from lavis_kvmod.tasks import capfilt as work
from lavis_kvmod.tasks.capfilt import CapFilt, CapFiltSettings

_FLAGS = {
    "captions": "captions that the captioner writes for an image",
    "itm": "least probability of the matching head; 0 does not ask it",
    "itc": "least cosine of image and text; -1 asks for none",
    "top_p": "of the captioner's nucleus sampling",
    "max_len": "most new tokens of a caption",
    "min_len": "fewest new tokens of a caption",
    "block": "images in a block, which is lost when the work is interrupted",
    "seed": "of the sampling",
}


def capfilt(
    cfg_path: str,
    out: str,
    *,
    split: str = "train",
    captioner: Optional[str] = None,
    options: Sequence[str] = (),
    captioner_options: Sequence[str] = (),
    settings: CapFiltSettings = CapFiltSettings(),  # noqa: B008  (immutable)
    shards: bool = False,
) -> Dict[str, int]:
    """Write ``kept.jsonl`` and ``dropped.jsonl`` into a folder; how many rows each has.

    Args:
        cfg_path, options: the run file of the filter (a stage-1 model) and of the images with their texts.
        out: the folder; a call that was interrupted goes on there.
        split: of the data.
        captioner, captioner_options: the run file of a `blip2_opt_kvmod`; None judges the given texts alone.
        settings: see `CapFiltSettings`.
        shards: also pack what is kept, for ``wds_caption``.

    Raises:
        ConfigurationError, CheckpointError, BadDataError: before the first image, listing what is wrong.
    """
    from lavis import tasks

    chosen = ["run.evaluate=true", "run.valid_splits=[]", f"run.test_splits=[{split}]"]
    cfg = load_config(cfg_path, [*options, *chosen])
    writer_cfg = None if captioner is None else _captioner(captioner, captioner_options)
    if not hasattr(registry.get_model_class(cfg.model_cfg.arch), "match"):
        raise ConfigurationError(cfg_path, [f"model.arch: expected blip2_kvmod, the filter; got {cfg.model_cfg.arch}"])
    init_distributed(cfg.run_cfg)
    seed_everything(cfg.run_cfg.seed)
    task = tasks.setup_task(cfg)
    (dataset,) = [splits[split] for splits in task.build_datasets(cfg).values() if split in splits]
    folder = expanded(out)
    made_by = {"filter": weights_named(cfg), "captioner": None if writer_cfg is None else weights_named(writer_cfg)}
    on_main(lambda: work.begin(folder, {**settings._asdict(), **made_by, "split": split, "texts": len(dataset)}))
    judge = _model(cfg, cfg.run_cfg.device)
    writer = None if writer_cfg is None else _model(writer_cfg, cfg.run_cfg.device)
    items = _items(dataset, split)
    blocks = work.blocks_of(Progress(items, "judging", log_every=1000, total=len(dataset)), settings.block)
    CapFilt(judge, writer, settings, folder).run(blocks, get_rank(), get_world_size())
    gather([None])  # all ranks are through
    counts = on_main(lambda: work.merge(folder))
    if shards:
        on_main(lambda: _pack(folder, items))
    return counts


def _captioner(cfg_path: str, options: Sequence[str]) -> KVModConfig:
    """A run file of which the model alone is used."""
    cfg = read_config(cfg_path, options)
    problems = model_problems(cfg.model_cfg)
    if not hasattr(registry.get_model_class(cfg.model_cfg.arch), "generate"):
        problems.append(f"model.arch: expected a model that writes captions, got {cfg.model_cfg.arch}")
    if problems:
        raise ConfigurationError(cfg_path, problems)
    return cfg


def _model(cfg: KVModConfig, device: str) -> Any:
    return ready(registry.get_model_class(cfg.model_cfg.arch).from_config(cfg.model_cfg), device)


def _items(dataset: Any, split: str) -> Iterable[Item]:
    """The images with their texts: of shards one after the other, else all that are listed."""
    if isinstance(dataset, ShardDataset):
        return work.shard_items(dataset.shards)
    kind, items = items_of(dataset, split)
    if kind != CAPTION:
        raise BadDataError(f"{split}: expected images with captions, got questions")
    return items


def _pack(folder: Path, items: Iterable[Item]) -> None:
    """What is kept, as shards: files where the data have them, else those that were saved."""
    by_name = {work.named(item)["image"]: item for item in items if isinstance(item, Item) and item.path}
    kept: Dict[str, List[Dict[str, Any]]] = {}
    for row in work.rows_of(folder / work.KEPT):
        kept.setdefault(row["image"], []).append({**row, "caption": [row["caption"]]})
    packed = []
    for name, rows in kept.items():
        own = folder / work.IMAGES / name
        item = by_name.get(name) or Item(name, path=str(own), stamp=(own.stat().st_size, own.stat().st_mtime_ns))
        packed.append(replace(item, entries=rows))
    Packer(folder / "shards", CAPTION, packed, PackSettings(name="kept", prefix="kept")).pack()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.epilog = "An interrupted call goes on where it stopped when it is given again. Ranks share the work."
    parser.add_argument("--cfg-path", required=True, metavar="YAML", help="run file of filter and data")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of it")
    parser.add_argument("--split", default="train", metavar="NAME", help="which split of the data (default: train)")
    parser.add_argument("--captioner", metavar="YAML", help="run file of a blip2_opt_kvmod that writes captions, too")
    parser.add_argument("--captioner-options", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of that")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the results go")
    parser.add_argument("--shards", action="store_true", help="also pack what is kept, for wds_caption")
    for name, default in CapFiltSettings()._asdict().items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(default), default=default, help=f"{_FLAGS[name]} (default: {default})")


def main(args: argparse.Namespace) -> int:
    """Run the command, and return its exit status."""
    set_up_logging()
    settings = CapFiltSettings(**{name: getattr(args, name) for name in CapFiltSettings._fields})
    try:
        with leaves_group():
            counts = capfilt(
                args.cfg_path,
                args.out,
                split=args.split,
                captioner=args.captioner,
                options=args.options,
                captioner_options=args.captioner_options,
                settings=settings,
                shards=args.shards,
            )
            if get_rank() == 0:
                print(f"{args.out}: kept {counts['kept']} texts, dropped {counts['dropped']}")
    except (*TOLD, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: whole blocks are kept; the same command goes on after them", file=sys.stderr)
        return 130
    return 0
