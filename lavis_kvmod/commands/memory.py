"""``lavis-kvmod memory``: the GPU memory that a run takes, by batch size, computed without a GPU or any weight."""

import argparse
from typing import Any, Dict, List, Optional

from omegaconf import DictConfig, OmegaConf

from lavis_kvmod.config.loading import ARCH, KVModConfig, read_config
from lavis_kvmod.memory.estimate import MemoryEstimate, estimate
from lavis_kvmod.memory.runs import GIB, evaluation_step, training_step
from lavis_kvmod.models.settings import ModelSettings
from lavis_kvmod.reports.markdown import table

DEFAULT_RUN_FILE = "projects/kvmod/vqa.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--cfg-path", metavar="YAML", default=DEFAULT_RUN_FILE, help="the run file; default: %(default)s"
    )
    parser.add_argument(
        "--options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="overrides, e.g. model.opt_model=facebook/opt-6.7b",
    )
    parser.add_argument(
        "--batch-sizes", nargs="+", type=int, metavar="N", help="images at once; default: the run file's"
    )


def main(args: argparse.Namespace) -> int:
    """Print both tables; returns the exit status."""
    try:
        cfg = read_config(args.cfg_path, args.options)
        if cfg.model_cfg.arch != ARCH:
            raise ValueError(f"{args.cfg_path} names {cfg.model_cfg.arch}; this command knows {ARCH}")
        print(tables(cfg, args.batch_sizes))
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    return 0


def tables(cfg: KVModConfig, batch_sizes: Optional[List[int]] = None) -> str:
    """Markdown tables of training (with and without OPT's gradient checkpointing) and of generating, in GiB."""
    train, evaluate = training_step(cfg.model_cfg, cfg.run_cfg), evaluation_step(cfg.model_cfg, cfg.run_cfg)
    blocks = [
        *tokens_line(cfg),
        f"Training: {train['text_length']} tokens of text, {train.get('target_length', train['text_length'])} of them "
        f"with a loss; amp {train['amp']}; one GPU; GiB",
        training_table(cfg.model_cfg, train, batch_sizes or [train["batch_size"]]),
        f"Generating: prompts of {evaluate['text_length']} tokens, {evaluate['new_tokens']} new ones, "
        f"{evaluate['num_beams']} beams; amp {evaluate['amp']}; one GPU; GiB",
        generation_table(cfg.model_cfg, evaluate, batch_sizes or [evaluate["batch_size"]]),
    ]
    return "\n\n".join(blocks)


def tokens_line(cfg: KVModConfig) -> List[str]:
    """Where a sample has several images, or fewer tokens of each: how many go into the connector, and come out."""
    settings = ModelSettings.from_config(cfg.model_cfg)
    images, each = settings.images_a_sample, settings.visual_tokens()
    all_tokens = settings.merge_visual_tokens is None and settings.pool_visual_tokens == 1
    if each is None or (images == 1 and all_tokens):
        return []
    called = "one image" if images == 1 else f"up to {images} images"
    return [
        f"A sample: {called} of {each} visual tokens, {images * each} into the connector; "
        f"{settings.num_soft_prompt()} soft-prompt vectors out of it"
    ]


def training_table(model_cfg: DictConfig, step: Dict[str, Any], batch_sizes: List[int]) -> str:
    """One row a batch size, without and with ``opt_grad_checkpoint``."""
    head = ["`opt_grad_checkpoint`", "batch", "weights", "gradients", "AdamW", "activations", "workspace", "total"]
    plain: Any = OmegaConf.to_container(model_cfg, resolve=True)
    rows = []
    for recompute in (False, True):
        section = {**plain, "opt_grad_checkpoint": recompute}
        for batch_size in batch_sizes:
            found = estimate(section, **{**step, "batch_size": batch_size})
            columns = [_weights(found), found.gradients, found.optimizer, sum(found.activations.values())]
            rows.append([str(recompute).lower(), str(batch_size), *map(_gib, [*columns, found.workspace, found.total])])
    return table(head, rows, right=range(1, len(head)))


def generation_table(model_cfg: DictConfig, step: Dict[str, Any], batch_sizes: List[int]) -> str:
    """One row a batch size; without the optimiser, which a training run holds on to while it evaluates."""
    head = ["batch", "weights", "K/V cache", "workspace", "total"]
    rows = []
    for batch_size in batch_sizes:
        found = estimate(model_cfg, **{**step, "batch_size": batch_size, "optimizer": False})
        rows.append([str(batch_size), *map(_gib, [_weights(found), found.kv_cache, found.workspace, found.total])])
    return table(head, rows, right=range(len(head)))


def _weights(found: MemoryEstimate) -> int:
    return sum(found.weights.values())


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"
