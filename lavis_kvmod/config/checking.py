"""What is wrong with a run file's names, run section, model section and files: lists of problems, for `loading`."""

import difflib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Dict, List, Optional, Sequence

import lavis.common.optims  # noqa: F401  (registers the learning-rate schedules)
import torch
from lavis.common.registry import registry
from lavis.common.utils import is_url
from omegaconf import DictConfig, OmegaConf

from lavis_kvmod.config.keys import run_settings, unread_keys
from lavis_kvmod.datasets.checks import builder_getter
from lavis_kvmod.models.language.positions import known_positions, length_problems
from lavis_kvmod.models.loading import stage_problem, text_side_problem
from lavis_kvmod.models.settings import ARCH, ModelSettings, SettingsError, Stage1Settings, settings_of
from lavis_kvmod.system.distributed import launched_rank
from lavis_kvmod.system.paths import CACHE, NO_HOME, cannot_be_written, has_home
from lavis_kvmod.system.precision import amp_problems, cuda_capability
from lavis_kvmod.system.sharding import sharding_problems
from lavis_kvmod.tasks.settings import TASK_SETTINGS, GenerationSettings, RetrievalSettings, VQASettings
from lavis_kvmod.weights.finding import WeightFile

if TYPE_CHECKING:
    from lavis_kvmod.config.loading import KVModConfig

__all__ = [
    "conversation_problems",
    "image_size_problems",
    "model_problems",
    "name_problems",
    "run_problems",
    "tell_unread_keys",
    "too_long_problems",
    "too_many_images_problems",
]

SECTIONS = ("model", "datasets", "run", "env", "preprocess")


def name_problems(raw: DictConfig) -> List[str]:
    """Unknown names, and sections that are not there."""
    problems = [
        f"{section}: this section is missing"
        for section in ("model", "datasets", "run")
        if not OmegaConf.is_dict(raw.get(section))
    ]
    problems += [
        f"{section}: not a section that LAVIS reads; those are {', '.join(SECTIONS)}"
        for section in map(str, raw)
        if section not in SECTIONS
    ]
    model, datasets, run = (raw.get(section) or OmegaConf.create() for section in ("model", "datasets", "run"))
    problems += _model_name_problems(model) if model else []
    for name, section in ((str(name), section) for name, section in datasets.items()):
        builder = registry.get_builder_class(name)
        if builder is None:
            problems.append(_unknown("datasets", name, registry.list_datasets()))
            continue
        kind = (section or {}).get("type", "default")
        if kind not in builder.DATASET_CONFIG_DICT:
            problems.append(_unknown(f"datasets.{name}.type", kind, list(builder.DATASET_CONFIG_DICT)))
    for name in run.get("train_dataset_ratios") or ():
        if name not in datasets:
            problems.append(_unknown("run.train_dataset_ratios", name, [str(name) for name in datasets]))
    named = {
        "task": (registry.get_task_class, registry.list_tasks),
        "runner": (registry.get_runner_class, registry.list_runners),
        "lr_sched": (registry.get_lr_scheduler_class, registry.list_lr_schedulers),
    }
    for key, (get, known) in named.items():
        if key in run and get(run[key]) is None:
            problems.append(_unknown(f"run.{key}", run[key], known()))
    return problems


def _model_name_problems(model: DictConfig) -> List[str]:
    arch, model_type = model.get("arch"), model.get("model_type")
    cls = registry.get_model_class(arch)
    if cls is None:
        return [_unknown("model.arch", arch, registry.list_models())]
    if model_type is None and not hasattr(cls, "default_model_type"):
        return [f"model.model_type: {arch} needs one of {', '.join(cls.PRETRAINED_MODEL_CONFIG_DICT)}"]
    if model_type is not None and model_type not in cls.PRETRAINED_MODEL_CONFIG_DICT:
        return [_unknown("model.model_type", model_type, list(cls.PRETRAINED_MODEL_CONFIG_DICT))]
    return []


def _unknown(what: str, got: object, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(got), known, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"{what}: {got!r} is not known{hint}; known: {', '.join(sorted(known))}"


def run_problems(run: DictConfig, starts: bool) -> List[str]:
    """What is wrong with the run section: its values, and what they ask of this machine.

    Args:
        run: the section.
        starts: whether this process is to run it.
    """
    told: Dict[str, None] = {}  # in order, each once: classes may share keys
    for declared in run_settings(run):
        told.update(dict.fromkeys(f"run.{problem}" for problem in declared.check(run)[1]))
    problems = list(told)
    wrong = {problem.partition(":")[0] for problem in problems}
    if "run.device" not in wrong:
        problems += _device_problems(run, starts, check_amp="run.amp" not in wrong)
    if "run.output_dir" not in wrong:
        problems += [f"run.output_dir: {problem}" for problem in cannot_be_written(run.output_dir)]
    problems += sharding_problems(run, starts)
    resume = run.get("resume_ckpt_path")
    if resume and resume != "auto":
        problem = WeightFile("checkpoint to resume from", str(resume), "run.resume_ckpt_path").problem()
        problems += [problem] if problem else []
    return problems


def _device_problems(run: DictConfig, starts: bool, check_amp: bool) -> List[str]:
    try:
        device = torch.device(run.device)
    except RuntimeError:
        return [f"run.device: expected cuda or cpu, got {run.device!r}"]
    device_type, problems = device.type, []
    if device.index:
        problems.append(
            f"run.device: {device} cannot work, since LAVIS puts batches on the first GPU it sees; set run.device: "
            f"cuda, and CUDA_VISIBLE_DEVICES={device.index} in the environment"
        )
    elif device_type == "cuda" and device.index == 0 and starts and launched_rank(os.environ) is not None:
        problems.append("run.device: cuda:0 puts all processes on one GPU; set run.device: cuda, and each has its own")
    capability = cuda_capability() if device_type == "cuda" else None
    if device_type == "cuda" and capability is None:
        problems.append("run.device: cuda, but this machine (or this PyTorch) has no CUDA; set run.device: cpu")
    if check_amp:
        # torch.cuda.is_bf16_supported() also counts emulation, which is slow
        problems += amp_problems(run.get("amp", False), device_type, capability is None or capability >= (8, 0))
    return problems


def tell_unread_keys(run: DictConfig) -> None:
    """A warning for each key that nothing reads in this run."""
    for told in unread_keys(run):
        logging.warning("%s", told)


def model_problems(model: DictConfig) -> List[str]:
    """What is wrong with the model section, and with the files that it names."""
    declared = settings_of(model)
    if declared is None:
        return []  # a stock model checks itself
    try:
        settings = declared.from_config(model)
        files = settings.weight_files()
        homeless = _home_problems(files)
        if homeless:  # nothing more can be looked up
            return homeless
    except SettingsError as error:
        return [f"model.{problem}" for problem in error.problems]
    except ImportError as error:
        return [f"model.aux_encoder: {error}"]
    problems = [problem for file in files for problem in [file.problem()] if problem]
    if isinstance(settings, Stage1Settings) and not problems:
        problems += _stage_problems(settings.checkpoint(), stage_problem)
    if isinstance(settings, ModelSettings) and settings.qformer_text_input and not problems:
        problems += _stage_problems(settings.checkpoint(), text_side_problem)
    return problems


def _stage_problems(checkpoint: Optional[WeightFile], problem_of: Callable[[Path], Optional[str]]) -> List[str]:
    path = None if checkpoint is None else checkpoint.local_path()
    problem = None if checkpoint is None or path is None else problem_of(path)
    return [] if checkpoint is None or problem is None else [f"{checkpoint.key}: {problem}"]


def _home_problems(files: Sequence[WeightFile]) -> List[str]:
    """Caches that would lie in a home folder, where there is none."""
    if has_home():
        return []
    needed = {
        CACHE: any(file.build is not None for file in files),
        "TORCH_HOME": any(is_url(str(file.source)) for file in files if file.build is None),
    }
    return [f"{NO_HOME}, or {name}" for name, asked in needed.items() if asked and not os.environ.get(name)]


def too_long_problems(cfg: "KVModConfig") -> List[str]:
    """Whether what a run of ours trains on and generates fits the language model's positions, as far as is known."""
    declared = TASK_SETTINGS.get(cfg.run_cfg.task)
    if cfg.model_cfg.arch != ARCH or declared is None or not issubclass(declared, GenerationSettings):
        return []
    model, wrong = ModelSettings.check(cfg.model_cfg)
    task, also_wrong = declared.check(cfg.run_cfg)
    if wrong or also_wrong:  # told by themselves
        return []
    soft_prompt = model.num_soft_prompt()
    if soft_prompt is None:  # told when the model is built
        return []
    return length_problems(
        opt_model=model.opt_model,
        soft_prompt=soft_prompt,
        told_by=f"connector: {model.connector}" if model.connector_kind.one_a_token else "num_query_token",
        max_txt_len=model.max_txt_len,
        max_len=task.max_len,
        prompt=None if isinstance(task, VQASettings) else model.prompt,
    )


def too_many_images_problems(cfg: "KVModConfig") -> List[str]:
    """Rows with more images than the model takes; to be asked when the data have been looked at."""
    declared = settings_of(cfg.model_cfg)
    if declared is None:
        return []
    takes = getattr(declared.check(cfg.model_cfg)[0], "max_images", 1)
    get, problems = builder_getter(cfg.run_cfg), []
    for name in cfg.datasets_cfg:
        number, source = get(name).most_images() if hasattr(get(name), "most_images") else (1, "")
        if number > takes:
            problems.append(
                f"model.max_images: expected at least {number}, the images that datasets.{name} has in {source}; "
                f"got {takes}"
            )
    return problems


def conversation_problems(cfg: "KVModConfig") -> List[str]:
    """Conversations that are longer than the language model, or for which images have no place in its text; to be asked
    when the data have been looked at."""
    get = builder_getter(cfg.run_cfg)
    told = [name for name in cfg.datasets_cfg if hasattr(get(name), "longest")]
    if not told or cfg.model_cfg.arch != ARCH:
        return [f"datasets.{name}: expected model.arch {ARCH}, got {cfg.model_cfg.arch}" for name in told]
    model, wrong = ModelSettings.check(cfg.model_cfg)
    if wrong:  # told by itself
        return []
    elsewhere = [
        f"model.{key}: the images of datasets.{told[0]} stand in the language model's text; leave it out"
        for key, is_set in (
            ("fusion: gated_cross_attention", model.fusion != "soft_prompt"),
            ("qformer_text_input", model.qformer_text_input),
            ("tiles", model.tiles is not None),
        )
        if is_set
    ]
    num_soft, has = model.num_soft_prompt(), known_positions(model.opt_model)
    if elsewhere or num_soft is None or has is None:
        return elsewhere
    problems = []
    for name in told:
        images, words, source = get(name).longest(num_soft)
        if images * num_soft + words > has:
            problems.append(
                f"datasets.{name}: {source} has {images} images of {num_soft} vectors and {words} words, "
                f"{images * num_soft + words} positions or more, and {model.opt_model} has {has}; shorten it, or take "
                "a connector with fewer vectors"
            )
    return problems


def head_problems(cfg: "KVModConfig") -> List[str]:
    """Whether the best are to be ranked anew by a matching head that this run does not train."""
    declared = TASK_SETTINGS.get(cfg.run_cfg.task)
    if declared is not RetrievalSettings or settings_of(cfg.model_cfg) is not Stage1Settings:
        return []
    objectives = cfg.model_cfg.get("objectives") or {}
    k_test = RetrievalSettings.check(cfg.run_cfg)[0].k_test
    if objectives.get("itm", 1) != 0 or not k_test:
        return []
    return [
        f"run.k_test: {k_test} are ranked anew by the matching head, which model.objectives.itm: 0 does not train; "
        "set 0, which ranks by the contrastive score alone"
    ]


def image_size_problems(cfg: "KVModConfig") -> List[str]:
    """Image processors that give another size than the model's ViT takes, where they are used."""
    declared = settings_of(cfg.model_cfg)
    if declared is None:
        return []
    run, expected = cfg.run_cfg, cfg.model_cfg.get("image_size", declared.default_of("image_size"))
    used = {"eval": bool(run.valid_splits or run.test_splits), "train": bool(run.train_splits) and not run.evaluate}
    problems = []
    for name, section in cfg.datasets_cfg.items():
        for mode, processor in (section.get("vis_processor") or {}).items():
            tiled = (processor or {}).get("tiles") is not None
            if used.get(mode) and tiled and processor.get("name") != "blip_image_eval":
                problems.append(
                    f"datasets.{name}.vis_processor.{mode}.name: expected blip_image_eval with model.tiles, got "
                    f"{processor.get('name')}: random crops would tear the tiles apart"
                )
            size = (processor or {}).get("image_size", expected)
            if used.get(mode) and size != expected:
                problems.append(
                    f"datasets.{name}.vis_processor.{mode}.image_size: expected model.image_size {expected}, got {size}"
                )
    return problems
