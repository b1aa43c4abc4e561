"""From the command line to a runner: shared by ``python -m lavis.train`` and ``python -m lavis.evaluate``."""

import argparse
import datetime
import errno
import logging
import os
import random
import sys
from typing import Any, Callable, Dict, List, Optional, Sequence

import numpy as np
import torch
from torch.distributed.elastic.multiprocessing.errors import record

from lavis_kvmod.config.loading import KVModConfig, load_config
from lavis_kvmod.datasets.bad_samples import BadDataError
from lavis_kvmod.runners.run_folder import RunFolderError
from lavis_kvmod.system.allocator import keep_freed_memory
from lavis_kvmod.system.distributed import from_main, get_rank, init_distributed, leaves_group
from lavis_kvmod.system.quiet import CountsWarnings, hide_deprecations
from lavis_kvmod.system.schema import ConfigurationError
from lavis_kvmod.weights.files import CheckpointError

# What the user can mend: told without a traceback.
TOLD = (ConfigurationError, CheckpointError, BadDataError, RunFolderError, FileNotFoundError, FloatingPointError)

# Errors of a system that has no room left to write to.
_NO_ROOM = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG") if hasattr(errno, name)}


def argument_parser(description: str) -> argparse.ArgumentParser:
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
    return parser


def parse_args(description: str, argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """Parse LAVIS's arguments; an option without a value ends with a sentence."""
    parser = argument_parser(description)
    args = parser.parse_args(argv)
    for option in args.options:
        if "=" not in option:
            parser.error(f"--options: expected section.key=value, got {option!r}")
    return args


def ready(model: Any, device: Any) -> Any:
    """A model to ask: on its device, in evaluation mode; in float32 on a CPU, as LAVIS's ``load_model`` has it."""
    return (model.float() if torch.device(device).type == "cpu" else model).to(device).eval()


def weights_named(cfg: KVModConfig) -> str:
    """The file of a run file's trained weights, as it names it; empty if it names none."""
    model = cfg.model_cfg
    return str((model.get("finetuned") if model.get("load_finetuned") else model.get("pretrained")) or "")


def build_runner(cfg: KVModConfig) -> Any:
    """Task, data sets, model and runner of a checked config, in LAVIS's order."""
    from lavis import tasks
    from lavis.common.registry import registry

    init_distributed(cfg.run_cfg)
    # On all ranks alike: only what is trained is sent around, so what a model draws must be the same.
    seed_everything(cfg.run_cfg.seed, cfg.run_cfg.get("deterministic", False))
    set_up_logging()
    if str(cfg.run_cfg.get("device", "cuda")) == "cpu":
        keep_freed_memory()
    cfg.pretty_print()

    runner_cls = registry.get_runner_class(cfg.run_cfg.runner)
    if hasattr(runner_cls, "open_folder"):  # before what takes long: another run may be using it
        folder = runner_cls.open_folder(cfg.run_cfg)
        place: Dict[str, Any] = {"job_id": folder.path.name, "folder": folder}
    else:
        place = {"job_id": from_main(datetime.datetime.now().strftime("%Y%m%d-%H%M%S"))}
    task = tasks.setup_task(cfg)
    datasets = task.build_datasets(cfg)
    model = task.build_model(cfg)
    if get_rank() > 0:
        seed_everything(cfg.run_cfg.seed + get_rank(), cfg.run_cfg.get("deterministic", False))
    return runner_cls(cfg=cfg, task=task, model=model, datasets=datasets, **place)


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy and torch, and keep cuDNN from choosing algorithms by timing, as LAVIS does.

    With ``deterministic`` PyTorch computes only with algorithms that give the same bits every time, and raises where it
    has none.
    """
    if deterministic:
        # cuBLAS reads it when it is first used: https://docs.nvidia.com/cuda/cublas/#results-reproducibility
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(bool(deterministic))
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def set_up_logging() -> None:
    """Log lines of rank 0, warnings of the others; one that comes again and again is counted."""
    logging.basicConfig(
        level=logging.INFO if get_rank() == 0 else logging.WARNING,
        format="%(asctime)s [%(levelname)s] %(message)s",
        force=True,
    )
    for handler in logging.getLogger().handlers:
        handler.addFilter(CountsWarnings())
    hide_deprecations()


def run_command(command: Callable[[str, List[str]], object], description: str, argv: Optional[Sequence[str]]) -> int:
    """Parse, run, and turn what the user can mend into a message without a traceback."""
    args = parse_args(description, argv)
    set_up_logging()
    try:
        # Under torchrun, what fails is written where torchrun finds it, and tells it with rank and traceback.
        with leaves_group():
            record(command)(args.cfg_path, args.options)
    except TOLD as error:
        print(f"error: {_message(error)}", file=sys.stderr)
        return 2
    except OSError as error:  # beside checkpoints, whose errors say more: a log, predictions
        if error.errno not in _NO_ROOM:
            raise
        print(
            f"error: {error}. What was saved before is intact: make room, then start again (a training with "
            "run.resume_ckpt_path=auto)",
            file=sys.stderr,
        )
        return 2
    return 0


def _message(error: Exception) -> str:
    """What the error says; of one that comes from a data worker, without the traceback PyTorch puts into it."""
    text = str(error)
    if not text.startswith(f"Caught {type(error).__name__} in DataLoader worker process"):
        return text
    return text.rpartition(f"{type(error).__name__}: ")[-1].strip()


__all__ = ["argument_parser", "build_runner", "load_config", "parse_args", "run_command"]
