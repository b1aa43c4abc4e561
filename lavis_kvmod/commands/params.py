"""``lavis-kvmod params``: what a model consists of, counted without allocating or loading any weight."""

import argparse
from typing import Any

from lavis_kvmod.config.loading import ARCH, read_config
from lavis_kvmod.models.blip2_opt_kvmod import Blip2OPTKVMod
from lavis_kvmod.models.parts import parts_table

TYPES = tuple(Blip2OPTKVMod.PRETRAINED_MODEL_CONFIG_DICT)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--cfg-path", metavar="YAML", help="the model of this run file")
    source.add_argument(
        "--model-type", default=Blip2OPTKVMod.default_model_type, choices=TYPES, help="default: %(default)s"
    )
    parser.add_argument(
        "--options", nargs="+", default=[], metavar="KEY=VALUE", help="overrides, e.g. model.prefix_gate=tanh"
    )


def main(args: argparse.Namespace) -> int:
    """Print the table; returns the exit status."""
    try:
        print(parts_table(Blip2OPTKVMod.without_weights(_model_config(args)).parts()))
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    return 0


def _model_config(args: argparse.Namespace) -> Any:
    from omegaconf import OmegaConf

    if not args.cfg_path:
        defaults = OmegaConf.load(Blip2OPTKVMod.default_config_path(args.model_type))
        return OmegaConf.merge(defaults, OmegaConf.from_dotlist(args.options)).model
    cfg = read_config(args.cfg_path, args.options).model_cfg
    if cfg.arch != ARCH:
        raise ValueError(f"{args.cfg_path} names {cfg.arch}; this command counts {ARCH}")
    return cfg
