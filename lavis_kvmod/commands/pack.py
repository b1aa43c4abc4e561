"""``lavis-kvmod pack``: write a run file's data as tar shards, or an index for shards that are there."""

import argparse
import signal
import sys
from typing import Dict, List, Optional, Sequence

from lavis_kvmod.commands.launch import set_up_logging
from lavis_kvmod.config.loading import load_config
from lavis_kvmod.datasets.bad_samples import BadDataError, BadSamplePolicy
from lavis_kvmod.datasets.checks import builder_getter
from lavis_kvmod.datasets.shards.counting import write_indices
from lavis_kvmod.datasets.shards.files import Shard, read_index
from lavis_kvmod.datasets.shards.packing import Packer, PackSettings, items_of, readable
from lavis_kvmod.datasets.shards.rows import CAPTION, VQA
from lavis_kvmod.system.paths import expanded
from lavis_kvmod.system.schema import ConfigurationError

SEED = 42


def pack(
    cfg_path: str,
    out: str,
    *,
    options: Sequence[str] = (),
    dataset: Optional[str] = None,
    splits: Sequence[str] = (),
    prefix: Optional[str] = None,
    max_count: int = PackSettings.max_count,
    max_bytes: int = PackSettings.max_bytes,
    seed: Optional[int] = SEED,
    check_images: bool = False,
) -> Dict[str, List[Shard]]:
    """Write splits of a run file's data set as shards, each split into a folder of its name below ``out``.

    Args:
        cfg_path, options: as `lavis_kvmod.config.loading.load_config`.
        dataset: which of the run file's data sets; it may be left out where there is one.
        splits: those the run uses, if none are named.
        prefix: what keys start with; the data set's name by default. The split's name is added.
        max_count, max_bytes: see `PackSettings`.
        seed: of the order in which training images are packed; None keeps theirs. Other splits keep theirs.
        check_images: decode each image first.

    Returns:
        The shards of each split.

    Raises:
        ConfigurationError: listing what is wrong with the run file's data.
        BadDataError: for data that cannot be packed, or folders that hold something else.
        FileNotFoundError: for ``~`` where there is no home folder.
    """
    folder = expanded(out)
    chosen = [f"run.{key}_splits=[{','.join(splits) if key == 'train' else ''}]" for key in ("train", "valid", "test")]
    chosen.append("run.evaluate=false")
    cfg = load_config(cfg_path, [*options, *(chosen if splits else [])], data_only=True)
    name = _which(dataset, list(cfg.datasets_cfg), cfg_path)
    section = cfg.datasets_cfg[name]
    built = builder_getter(cfg.run_cfg)(name)(section).build_datasets()
    used = splits or [split for key in ("train", "valid", "test") for split in cfg.run_cfg.get(f"{key}_splits") or ()]
    written = {}
    for split in dict.fromkeys(used):
        if split not in built:
            raise BadDataError(f"{name} has no split {split!r}; it has {', '.join(built)}")
        title = f"{name}, {split}"
        kind, items = items_of(built[split], title)
        if check_images:
            items = readable(items, BadSamplePolicy.from_config(section), title)
        settings = PackSettings(
            name=split.replace(".", "_"),
            prefix=f"{prefix or name}-{split}".replace(".", "_"),
            max_count=max_count,
            max_bytes=max_bytes,
            seed=seed if split == "train" else None,
        )
        answers = getattr(built[split], "answer_list", None) if kind == VQA else None
        written[split] = Packer(folder / split, kind, items, settings, answers).pack()
    return written


def _which(dataset: Optional[str], names: Sequence[str], cfg_path: str) -> str:
    """The data set to pack, of those in the run file."""
    if dataset is None and len(names) != 1:
        raise BadDataError(f"{cfg_path} has the data sets {', '.join(names)}; say which with --dataset")
    name = dataset or names[0]
    if name not in names:
        raise BadDataError(f"--dataset: {cfg_path} has {', '.join(names)}, got {name!r}")
    return name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.epilog = "A packing that was interrupted goes on where it stopped when the command is given again."
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--cfg-path", metavar="YAML", help="run file with the data set to pack")
    source.add_argument(
        "--index",
        nargs="+",
        metavar="SHARDS",
        help="write the index (shards.json) of existing shards: paths, folders, globs or lists in braces",
    )
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of the run file")
    parser.add_argument("--dataset", metavar="NAME", help="which of the run file's data sets, if there are several")
    parser.add_argument("--split", nargs="+", default=[], metavar="NAME", help="splits to pack (default: the run's)")
    parser.add_argument("--out", metavar="FOLDER", help="where to write; each split gets a folder of its name in it")
    parser.add_argument("--prefix", metavar="TEXT", help="what keys start with (default: the data set's name)")
    parser.add_argument(
        "--max-count", type=int, default=PackSettings.max_count, metavar="N", help="images in a shard (default: 10000)"
    )
    parser.add_argument("--max-size-mb", type=float, default=1000, metavar="X", help="MB in a shard (default: 1000)")
    parser.add_argument("--seed", type=int, default=SEED, help="of the order of training images (default: 42)")
    parser.add_argument("--keep-order", action="store_true", help="pack training images in the order they have")
    parser.add_argument("--check-images", action="store_true", help="decode each image before packing any")
    parser.add_argument("--kind", choices=[VQA.name, CAPTION.name], help="with --index: what the shards hold")
    parser.add_argument("--skip-bad", action="store_true", help="with --index: only report samples that cannot be used")


def main(args: argparse.Namespace) -> int:
    """Run the command, and return its exit status."""
    set_up_logging()
    # A process that is asked to end cleans up as one that is interrupted does.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if args.index:
            for path in write_indices(args.index, args.kind, args.skip_bad):
                print(f"wrote {path}")
            return 0
        if not args.out:
            raise ValueError("--out: not given; it is the folder to write to")
        written = pack(
            args.cfg_path,
            args.out,
            options=args.options,
            dataset=args.dataset,
            splits=args.split,
            prefix=args.prefix,
            max_count=args.max_count,
            max_bytes=int(args.max_size_mb * 1e6),
            seed=None if args.keep_order else args.seed,
            check_images=args.check_images,
        )
        print(_summary(written))
    except (ConfigurationError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: whole shards are kept; the same command goes on after them", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _summary(written: Dict[str, List[Shard]]) -> str:
    """What was written, and how a run file names it."""
    lines = []
    for split, shards in written.items():
        images, texts, size = (sum(getattr(s.contents, key) for s in shards) for key in ("images", "texts", "bytes"))
        lines.append(f"{split}: {len(shards)} shards, {images} images with {texts} texts, {size / 1e6:.1f} MB")
    folders = {split: shards[0].path.parent.absolute() for split, shards in written.items()}
    kind = (read_index(next(iter(folders.values()))) or {})["kind"]
    lines += ["", "In a run file:", "", "datasets:", f"  wds_{kind}:", "    build_info:", "      annotations:"]
    for split, folder in folders.items():
        lines += [f"        {split}:", f"          storage: {folder}"]
    return "\n".join(lines)
