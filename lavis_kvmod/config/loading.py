"""A run file, merged as LAVIS merges it, and checked: all that is wrong with it is told at once, before anything
heavy is loaded."""

import argparse
import difflib
import logging
from typing import Any, Dict, List, Sequence

import lavis.common.optims  # noqa: F401  (registers the learning-rate schedules)
import torch
from lavis.common.config import Config
from lavis.common.registry import registry
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lavis_kvmod.datasets.checks import data_problems, keep_used_splits, kind_problems
from lavis_kvmod.models.settings import ModelSettings, SettingsError
from lavis_kvmod.runners.settings import RUNNER_KEYS, runner_problems
from lavis_kvmod.system.lavis_paths import use_cache_root
from lavis_kvmod.system.paths import resolve_config
from lavis_kvmod.system.precision import amp_problems, cuda_capability
from lavis_kvmod.system.schema import ConfigurationError
from lavis_kvmod.system.sharding import sharding_problems
from lavis_kvmod.tasks.settings import RUN_KEYS, task_problems
from lavis_kvmod.weights.finding import WeightFile

ARCH = "blip2_opt_kvmod"
SECTIONS = ("model", "datasets", "run", "env", "preprocess")

# LAVIS reads these keys without a default; these are its recipes' values.
RUN_DEFAULTS: Dict[str, Any] = {
    "task": "kvmod_vqa",
    "device": "cuda",
    "distributed": False,
    "world_size": 1,
    "dist_url": "env://",
    "evaluate": False,
    "seed": 42,
    "num_workers": 4,
    "batch_size_train": 16,
    "batch_size_eval": 16,
    "max_epoch": 1,
    "lr_sched": "linear_warmup_cosine_lr",
    "init_lr": 1e-5,
    "min_lr": 0.0,
    "weight_decay": 0.05,
    "output_dir": "output",
    "train_splits": ["train"],
    "valid_splits": [],
    "test_splits": [],
}

# Keys of LAVIS's runners and tasks, and ours, that have no entry above.
OPTIONAL_RUN_KEYS = set(
    "runner prompt num_beams max_len min_len inference_method num_ans_candidates report_metric warmup_lr warmup_steps "
    "lr_decay_rate beta2 amp accum_grad_iters log_freq resume_ckpt_path use_dist_eval_sampler train_dataset_ratios "
    "max_iters iters_per_inner_epoch k_test rank gpu dist_backend length_penalty top_p temperature "
    "repetition_penalty task_type".split()
).union(RUN_KEYS, RUNNER_KEYS)


class KVModConfig(Config):
    """LAVIS's Config with defaults for the run section, a default model type, and options that may name one."""

    def __init__(self, cfg_path, options: Sequence[str] = ()):
        super().__init__(argparse.Namespace(cfg_path=str(cfg_path), options=list(options)))
        self.config = OmegaConf.merge({"run": RUN_DEFAULTS}, self.config)
        if "runner" not in self.config.run:
            ours = self.config.model.arch == ARCH
            self.config.run.runner = "runner_kvmod" if ours else "runner_base"

    @staticmethod
    def build_model_config(config, **kwargs) -> DictConfig:
        """The model type's defaults under the run file's; LAVIS looks an option's model type up under a key that is
        never there (config.py:66)."""
        options = OmegaConf.create(kwargs).get("model", {})
        model = OmegaConf.merge(config.model, options)
        cls = registry.get_model_class(model.arch)
        if model.get("model_type", None) is None:
            model.model_type = cls.default_model_type
        defaults = OmegaConf.load(cls.default_config_path(model_type=model.model_type))
        # The defaults' `arch` is the architecture's or, in LAVIS's own files, the type's name.
        return OmegaConf.merge(defaults, {"model": model})


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
    problems = _name_problems(raw) + _use_cache_root(raw)
    if problems:  # names decide which defaults to merge, so nothing more can be checked
        if not data_only:
            problems += _run_problems(OmegaConf.merge(RUN_DEFAULTS, raw.get("run") or {}), starts)
        raise ConfigurationError(path, problems)
    cfg = KVModConfig(path, options)
    _add_image_processors(cfg)
    if not data_only:
        problems = _run_problems(cfg.run_cfg, starts) + _model_problems(cfg.model_cfg) + _image_size_problems(cfg)
        problems += kind_problems(cfg)
    ranks = cfg.run_cfg.get("inference_method") == "rank" and not cfg.run_cfg.get("answer_list")
    # What is packed may be ranked later.
    problems += keep_used_splits(cfg, ranks or data_only) or data_problems(cfg)
    if problems:
        raise ConfigurationError(path, problems)
    return cfg


def read_config(cfg_path: str, options: Sequence[str] = ()) -> KVModConfig:
    """A run file, merged as by `load_config`; of what it says only the names are checked. Raises as `load_config`."""
    path = resolve_config(cfg_path)
    problems = _name_problems(_read(path, options))
    if problems:
        raise ConfigurationError(path, problems)
    return KVModConfig(path, options)


def _read(path, options: Sequence[str]) -> DictConfig:
    try:
        return OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(options)))
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigurationError(path, [f"not a YAML file LAVIS can read: {error}"]) from error
    except Exception as error:  # PyYAML's errors share no base that OmegaConf exposes
        raise ConfigurationError(path, [f"not valid YAML: {error}"]) from error


def _unknown(what: str, got, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(got), known, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"{what}: {got!r} is not known{hint}; known: {', '.join(sorted(known))}"


def _name_problems(raw: DictConfig) -> List[str]:
    """Unknown names, and sections that are not there."""
    problems = [
        f"{section}: this section is missing"
        for section in ("model", "datasets", "run")
        if not OmegaConf.is_dict(raw.get(section))
    ]
    problems += [
        f"{key}: not a section that LAVIS reads; those are {', '.join(SECTIONS)}" for key in raw if key not in SECTIONS
    ]
    model, datasets, run = (raw.get(section) or {} for section in ("model", "datasets", "run"))
    if model:
        arch, model_type = model.get("arch"), model.get("model_type")
        cls = registry.get_model_class(arch)
        if cls is None:
            problems.append(_unknown("model.arch", arch, registry.list_models()))
        elif model_type is None and not hasattr(cls, "default_model_type"):
            problems.append(f"model.model_type: {arch} needs one of {', '.join(cls.PRETRAINED_MODEL_CONFIG_DICT)}")
        elif model_type is not None and model_type not in cls.PRETRAINED_MODEL_CONFIG_DICT:
            problems.append(_unknown("model.model_type", model_type, list(cls.PRETRAINED_MODEL_CONFIG_DICT)))
    for name, section in datasets.items():
        builder = registry.get_builder_class(name)
        if builder is None:
            problems.append(_unknown("datasets", name, registry.list_datasets()))
            continue
        kind = (section or {}).get("type", "default")
        if kind not in builder.DATASET_CONFIG_DICT:
            problems.append(_unknown(f"datasets.{name}.type", kind, list(builder.DATASET_CONFIG_DICT)))
    named = {
        "task": (registry.get_task_class, registry.list_tasks),
        "runner": (registry.get_runner_class, registry.list_runners),
        "lr_sched": (registry.get_lr_scheduler_class, registry.list_lr_schedulers),
    }
    for key, (get, known) in named.items():
        if key in run and get(run[key]) is None:
            problems.append(_unknown(f"run.{key}", run[key], known()))
    return problems


def _use_cache_root(raw: DictConfig) -> List[str]:
    """Have data looked for where ``env.cache_root`` says; the problem with it, if there is one."""
    root = OmegaConf.select(raw, "env.cache_root")
    if root is not None and not (isinstance(root, str) and root):
        return [f"env.cache_root: expected the path of a folder, got {root!r}"]
    use_cache_root(root)
    return []


def _run_problems(run: DictConfig, starts: bool) -> List[str]:
    problems = []
    try:
        device_type = torch.device(run.device).type
    except RuntimeError:
        return [f"run.device: expected cuda or cpu, got {run.device!r}"]
    capability = cuda_capability() if device_type == "cuda" else None
    if device_type == "cuda" and capability is None:
        problems.append("run.device: cuda, but this machine (or this PyTorch) has no CUDA; set run.device: cpu")
    # torch.cuda.is_bf16_supported() also counts emulation, which is slow
    problems += amp_problems(run.get("amp", False), device_type, capability is None or capability >= (8, 0))
    problems += task_problems(run)
    for key in ("batch_size_train", "batch_size_eval", "max_epoch", "accum_grad_iters"):
        value = run.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            problems.append(f"run.{key}: expected a whole number above 0, got {value!r}")
    if not isinstance(run.output_dir, str) or not run.output_dir:
        problems.append(
            f"run.output_dir: expected the path of a folder (YAML wants a number in quotes), got {run.output_dir!r}"
        )
    problems += runner_problems(OmegaConf.to_container(run, resolve=True)) + sharding_problems(run, starts)
    resume = run.get("resume_ckpt_path")
    if resume and resume != "auto":
        problem = WeightFile("checkpoint to resume from", str(resume), "run.resume_ckpt_path").problem()
        problems += [problem] if problem else []
    for key in run:
        if key not in RUN_DEFAULTS and key not in OPTIONAL_RUN_KEYS:
            logging.warning("run.%s: not a key that LAVIS or lavis-kvmod reads", key)
    return problems


def _model_problems(model: DictConfig) -> List[str]:
    if model.arch != ARCH:
        return []  # a stock model checks itself
    try:
        settings = ModelSettings.from_config(model)
        files = settings.weight_files()
    except SettingsError as error:
        return [f"model.{problem}" for problem in error.problems]
    except ImportError as error:
        return [f"model.aux_encoder: {error}"]
    return [problem for file in files for problem in [file.problem()] if problem]


def _add_image_processors(cfg: KVModConfig) -> None:
    """LAVIS's own data sets name no image processors, and would give pictures where the model wants tensors: they get
    those of our run files, at the model's image size."""
    if cfg.model_cfg.arch != ARCH:
        return
    size = cfg.model_cfg.get("image_size", ModelSettings.image_size)
    for section in cfg.datasets_cfg.values():
        for mode, name in (("train", "blip2_image_train"), ("eval", "blip_image_eval")):
            if OmegaConf.select(section, f"vis_processor.{mode}") is None:
                OmegaConf.update(section, f"vis_processor.{mode}", {"name": name, "image_size": size}, force_add=True)


def _image_size_problems(cfg: KVModConfig) -> List[str]:
    """Image processors that give another size than the model's ViT takes, where they are used."""
    if cfg.model_cfg.arch != ARCH:
        return []
    run, expected = cfg.run_cfg, cfg.model_cfg.get("image_size", ModelSettings.image_size)
    used = {"eval": bool(run.valid_splits or run.test_splits), "train": bool(run.train_splits) and not run.evaluate}
    problems = []
    for name, section in cfg.datasets_cfg.items():
        for mode, processor in (section.get("vis_processor") or {}).items():
            size = (processor or {}).get("image_size", expected)
            if used.get(mode) and size != expected:
                problems.append(
                    f"datasets.{name}.vis_processor.{mode}.image_size: expected model.image_size {expected}, got {size}"
                )
    return problems
