"""``lavis-kvmod params``: what a model consists of, counted without allocating or loading any weight."""

import argparse
from typing import Type

from omegaconf import DictConfig, OmegaConf

from lavis_kvmod.config.loading import read_config
from lavis_kvmod.models.base import KVModBase
from lavis_kvmod.models.parts import parts_table
from lavis_kvmod.models.settings import ARCH, SETTINGS
from lavis_kvmod.system.lavis_paths import lavis_registry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--cfg-path", metavar="YAML", help="the model of this run file")
    source.add_argument(
        "--model-type", metavar="TYPE", help="the model of this type (lavis-kvmod list models); default: the arch's own"
    )
    parser.add_argument("--arch", default=ARCH, choices=list(SETTINGS), help="with --model-type; default: %(default)s")
    parser.add_argument(
        "--options", nargs="+", default=[], metavar="KEY=VALUE", help="overrides, e.g. model.prefix_gate=tanh"
    )


def main(args: argparse.Namespace) -> int:
    """Print the table; returns the exit status."""
    try:
        config = _model_config(args)
        print(parts_table(_model_class(config.arch).without_weights(config).parts()))
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    return 0


def _model_class(arch: str) -> Type[KVModBase]:
    if arch not in SETTINGS:
        raise ValueError(f"model.arch: expected one of {', '.join(SETTINGS)}, which this command counts; got {arch}")
    return lavis_registry().get_model_class(arch)


def _model_config(args: argparse.Namespace) -> DictConfig:
    if args.cfg_path:
        return read_config(args.cfg_path, args.options).model_cfg
    cls = _model_class(args.arch)
    defaults = OmegaConf.load(cls.default_config_path(args.model_type or cls.default_model_type))
    return OmegaConf.merge(defaults, {"model": {"arch": args.arch}}, OmegaConf.from_dotlist(args.options)).model
