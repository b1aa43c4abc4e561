"""A run file, merged as LAVIS merges it. All that is wrong with it is told at once, before anything heavy is loaded:
what is looked at stands in `checking`."""

import argparse
import json
from pathlib import Path
from typing import Any, List, Sequence, Union

from lavis.common.config import Config
from lavis.common.registry import registry
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lavis_kvmod.config.checking import (
    conversation_problems,
    head_problems,
    image_size_problems,
    model_problems,
    name_problems,
    run_problems,
    tell_unread_keys,
    too_long_problems,
    too_many_images_problems,
)
from lavis_kvmod.config.keys import OUR_RUNNER, run_defaults, run_settings
from lavis_kvmod.datasets.checks import data_problems, keep_used_splits, kind_problems
from lavis_kvmod.models.settings import ARCH, SETTINGS, settings_of
from lavis_kvmod.system.lavis_paths import use_cache_root
from lavis_kvmod.system.paths import resolve_config
from lavis_kvmod.system.schema import ConfigurationError
from lavis_kvmod.system.secrets import without_secrets

__all__ = ["ARCH", "KVModConfig", "load_config", "read_config"]


class KVModConfig(Config):
    """LAVIS's Config with defaults for the run section, a default model type, and options that may name one."""

    config: DictConfig

    def __init__(self, cfg_path: Union[str, Path], options: Sequence[str] = ()):
        super().__init__(argparse.Namespace(cfg_path=str(cfg_path), options=list(options)))
        merged: Any = OmegaConf.merge({"run": run_defaults()}, self.config)
        self.config = merged
        if self.config.run.get("runner") is None:
            self.config.run.runner = OUR_RUNNER if self.config.model.arch in SETTINGS else "runner_base"

    def _convert_node_to_json(self, node: Any) -> str:
        """For LAVIS's ``pretty_print``, which would print what comes from the environment."""
        return json.dumps(without_secrets(node), indent=4, sort_keys=True)

    @staticmethod
    def build_model_config(config: DictConfig, **kwargs: Any) -> DictConfig:
        """The model type's defaults under the run file's; LAVIS looks an option's model type up under a key that is
        never there (config.py:66)."""
        options = OmegaConf.create(kwargs).get("model", {})
        model: Any = OmegaConf.merge(config.model, options)
        cls = registry.get_model_class(model.arch)
        if model.get("model_type", None) is None:
            model.model_type = cls.default_model_type
        defaults = OmegaConf.load(cls.default_config_path(model_type=model.model_type))
        # The defaults' `arch` is the architecture's or, in LAVIS's own files, the type's name.
        merged: Any = OmegaConf.merge(defaults, {"model": model})
        return merged


def load_config(
    cfg_path: str, options: Sequence[str] = (), *, data_only: bool = False, starts: bool = True
) -> KVModConfig:
    """Read, merge and check a run file.

    Args:
        cfg_path: a path, or a ``projects/…`` file of the installed package.
        options: ``section.key=value`` overrides, as LAVIS's ``--options``.
        data_only: whether nothing is to be run here, so that only the data need be there.
        starts: whether this process is to run it, rather than look whether it could be run.

    Raises:
        FileNotFoundError: if there is no such run file.
        ConfigurationError: listing all that is wrong.
    """
    path = resolve_config(cfg_path)
    raw = _read(path, options)
    problems = name_problems(raw) + _use_cache_root(raw)
    if problems:  # names decide which defaults to merge, so nothing more can be checked
        if not data_only:
            run: Any = OmegaConf.merge(run_defaults(), raw.get("run") or {})
            problems += run_problems(run, starts)
        raise ConfigurationError(path, problems)
    cfg = KVModConfig(path, options)
    _add_image_processors(cfg)
    _add_tiles(cfg)
    if not data_only:
        problems = run_problems(cfg.run_cfg, starts) + model_problems(cfg.model_cfg) + image_size_problems(cfg)
        problems += too_long_problems(cfg) + head_problems(cfg) + kind_problems(cfg)
        tell_unread_keys(cfg.run_cfg)
    ranks = cfg.run_cfg.get("inference_method") == "rank" and not cfg.run_cfg.get("answer_list")
    # What is packed may be ranked later.
    problems += keep_used_splits(cfg, ranks or data_only) or data_problems(cfg)
    if not data_only:
        problems += too_many_images_problems(cfg) + conversation_problems(cfg)
    if problems:
        raise ConfigurationError(path, problems)
    if not data_only:
        _write_as_meant(cfg.run_cfg)
    return cfg


def read_config(cfg_path: str, options: Sequence[str] = ()) -> KVModConfig:
    """A run file, merged as by `load_config`; of what it says only the names are checked. Raises as `load_config`."""
    path = resolve_config(cfg_path)
    problems = name_problems(_read(path, options))
    if problems:
        raise ConfigurationError(path, problems)
    return KVModConfig(path, options)


def _read(path: Path, options: Sequence[str]) -> DictConfig:
    try:
        merged: Any = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(options)))
        return merged
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigurationError(path, [f"not a YAML file LAVIS can read: {error}"]) from error
    except Exception as error:  # PyYAML's errors share no base that OmegaConf exposes
        raise ConfigurationError(path, [f"not valid YAML: {error}"]) from error


def _use_cache_root(raw: DictConfig) -> List[str]:
    """Have data looked for where ``env.cache_root`` says; the problem with it, if there is one."""
    root = OmegaConf.select(raw, "env.cache_root")
    if root is not None and not (isinstance(root, str) and root):
        return [f"env.cache_root: expected the path of a folder, got {root!r}"]
    use_cache_root(root)
    return []


def _write_as_meant(run: DictConfig) -> None:
    """What LAVIS reads of the section itself, as the check understood it: a number in quotes as a number."""
    for declared in run_settings(run):
        settings = declared.of(run)
        for name in settings.model_fields_set:
            if run[name] != getattr(settings, name):
                run[name] = getattr(settings, name)


def _add_tiles(cfg: KVModConfig) -> None:
    """``model.tiles`` for the image processors, which do the cutting."""
    tiles = cfg.model_cfg.get("tiles")
    for section in cfg.datasets_cfg.values() if tiles is not None else ():
        for mode in ("train", "eval"):
            OmegaConf.update(section, f"vis_processor.{mode}.tiles", tiles, force_add=True)


def _add_image_processors(cfg: KVModConfig) -> None:
    """LAVIS's own data sets name no image processors, and would give pictures where the model wants tensors: they get
    those of our run files, at the model's image size."""
    declared = settings_of(cfg.model_cfg)
    if declared is None:
        return
    size = cfg.model_cfg.get("image_size", declared.default_of("image_size"))
    for section in cfg.datasets_cfg.values():
        for mode, name in (("train", "blip2_image_train"), ("eval", "blip_image_eval")):
            if OmegaConf.select(section, f"vis_processor.{mode}") is None:
                OmegaConf.update(section, f"vis_processor.{mode}", {"name": name, "image_size": size}, force_add=True)
