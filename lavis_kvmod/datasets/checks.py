"""What a run file says about its data, checked before anything heavy is loaded: which splits it uses, and whether their
files are there."""

from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

from lavis.common.registry import registry
from lavis.common.utils import get_cache_path
from omegaconf import DictConfig, OmegaConf

from lavis_kvmod.datasets.lavis_sets.base import SPLITS
from lavis_kvmod.datasets.lavis_sets.files import annotation_files, image_folder_problems

__all__ = ["builder_getter", "data_problems", "keep_used_splits", "kind_problems"]

_SPLIT_KEYS = ("train_splits", "valid_splits", "test_splits")
_TASKS = {"answer": "kvmod_vqa", "caption": "kvmod_captioning"}


def builder_getter(run: DictConfig) -> Callable:
    """What gives a run's task the builder of a data set by its name (ours differ from LAVIS's)."""
    return getattr(registry.get_task_class(run.task), "builder_class", registry.get_builder_class)


def keep_used_splits(cfg: Any, ranks: bool) -> List[str]:
    """Take what a run does not use out of its data sets' sections, so that no file of another split is asked for,
    fetched or read; LAVIS's builders read all. A data set of which nothing is used goes as a whole.

    Args:
        ranks: whether the data sets' answers are needed as candidates for ranking.

    Returns:
        The problems: splits that no data set has.
    """
    keys = [key for key in _SPLIT_KEYS if not (key == "train_splits" and cfg.run_cfg.evaluate)]
    used = {key: list(cfg.run_cfg.get(key) or []) for key in keys}
    needed = {split for splits in used.values() for split in splits}
    known = {name: _splits_given(name, section, cfg) for name, section in cfg.datasets_cfg.items()}
    if None not in known.values():
        every = {split for splits in known.values() for split in splits or ()}
        lists = "; ".join(f"{name} has {', '.join(splits or ())}" for name, splits in known.items())
        problems = [
            f"run.{key}: no data set has a split {split!r}; {lists}"
            for key, splits in used.items()
            for split in splits
            if split not in every
        ]
        if problems:
            return problems
    for split in [split for key in keys if key != "train_splits" for split in used[key]]:
        owners = [name for name, splits in known.items() if split in (splits or ())]
        if len(owners) > 1:  # LAVIS joins data sets for training only (datasets/datasets/dataloader_utils.py)
            return [
                f"datasets: {' and '.join(owners)} each have a split {split!r}, and one can be evaluated at a time; "
                f"take it out of the others, e.g. datasets.{owners[-1]}.build_info.annotations.{split}=null"
            ]
    for name, splits in known.items():
        if splits is None:
            continue
        section = cfg.datasets_cfg[name]
        reads = builder_getter(cfg.run_cfg)(name)
        reads = reads.splits_read(section, needed, ranks) if hasattr(reads, "splits_read") else needed
        if not needed & set(splits):
            del cfg.datasets_cfg[name]  # such as vg_vqa, which is for training alone, in an evaluation
            continue
        for split in [split for split in section.build_info.annotations if split not in reads]:
            del section.build_info.annotations[split]
    return []


def _splits_given(name: str, section: DictConfig, cfg: Any) -> Optional[List[str]]:
    """The splits of a data set by its files, or None where only its builder can tell."""
    builder = builder_getter(cfg.run_cfg)(name)
    if hasattr(builder, "splits_given"):
        return builder.splits_given(section)
    annotations: Any = OmegaConf.select(section, "build_info.annotations")
    if builder.__module__.startswith("lavis.") and OmegaConf.is_dict(annotations):
        return [split for split in annotations if split in SPLITS]
    return None


def _lavis_places(storage: str) -> List[Path]:
    return [Path(get_cache_path(storage))]


def data_problems(cfg: Any) -> List[str]:
    """Images and annotations that a run's builders would look for and not find, or could not use."""
    get = builder_getter(cfg.run_cfg)
    problems = []
    for name, section in cfg.datasets_cfg.items():
        builder = get(name)
        if hasattr(builder, "config_problems"):  # ours look into their files
            found = builder.config_problems(section)
        elif section.get("build_info"):
            files = annotation_files(section, places=_lavis_places)
            found = [problem for file in files for problem in [file.problem()] if problem]
            found += image_folder_problems(section, places=_lavis_places)
        else:
            found = []
        problems += [f"datasets.{name}: {problem}" for problem in found]
    return problems


def kind_problems(cfg: Any) -> List[str]:
    """Data sets that hold captions where the task learns answers, or the other way round."""
    task, get = cfg.run_cfg.task, builder_getter(cfg.run_cfg)
    wanted = getattr(registry.get_task_class(task), "target", None)
    held: Dict[str, Any] = {name: getattr(get(name), "target", wanted) for name in cfg.datasets_cfg}
    return [
        f"datasets.{name}: it holds {target}s, but run.task: {task} learns {wanted}s; set run.task: {_TASKS[target]}"
        for name, target in held.items()
        if wanted and target != wanted
    ]
