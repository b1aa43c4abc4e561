"""From the command line to a runner: shared by ``python -m lavis.train`` and ``python -m lavis.evaluate``."""

import argparse
import datetime
import logging
import random
import sys
import warnings
from typing import Callable, List, Optional, Sequence

import numpy as np
import torch

from lavis_kvmod.checkpoints import CheckpointError
from lavis_kvmod.config import ConfigurationError, KVModConfig, load_config
from lavis_kvmod.datasets.bad_samples import BadDataError
from lavis_kvmod.distributed import from_main, get_rank, init_distributed


def parse_args(description: str, argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """LAVIS's arguments: ``--cfg-path`` and ``--options``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cfg-path",
        required=True,
        metavar="YAML",
        help="run file; projects/... is also looked up in the installed package",
    )
    parser.add_argument(
        "--options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="override values of the run file, e.g. run.max_epoch=2 model.kv_modulation=false",
    )
    args = parser.parse_args(argv)
    for option in args.options:
        if "=" not in option:
            parser.error(f"--options: expected section.key=value, got {option!r}")
    return args


def build_runner(cfg: KVModConfig):
    """Task, data sets, model and runner of a checked config, in LAVIS's order."""
    from lavis import tasks
    from lavis.common.registry import registry

    init_distributed(cfg.run_cfg)
    seed_everything(cfg.run_cfg.seed + get_rank())
    set_up_logging()
    cfg.pretty_print()

    job_id = from_main(datetime.datetime.now().strftime("%Y%m%d-%H%M%S"))
    task = tasks.setup_task(cfg)
    datasets = task.build_datasets(cfg)
    model = task.build_model(cfg)
    runner_cls = registry.get_runner_class(cfg.run_cfg.runner)
    return runner_cls(cfg=cfg, job_id=job_id, task=task, model=model, datasets=datasets)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch, and keep cuDNN from choosing algorithms by timing, as LAVIS does."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def set_up_logging() -> None:
    """Log lines of rank 0, warnings of the others."""
    logging.basicConfig(
        level=logging.INFO if get_rank() == 0 else logging.WARNING,
        format="%(asctime)s [%(levelname)s] %(message)s",
        force=True,
    )
    # PyTorch warns at every call of functions that LAVIS's pinned dependencies use.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|fairscale|timm)\b")


def run_command(command: Callable[[str, List[str]], object], description: str, argv) -> int:
    """Parse, run, and turn what the user can mend into a message without a traceback."""
    args = parse_args(description, argv)
    set_up_logging()
    try:
        command(args.cfg_path, args.options)
    except (ConfigurationError, CheckpointError, BadDataError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


__all__ = ["build_runner", "load_config", "parse_args", "run_command"]
