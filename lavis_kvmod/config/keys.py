"""Which declared keys a run file may have: the parts' own declarations, by section."""

import difflib
from typing import Any, Dict, List, Mapping, NamedTuple, Type

from lavis_kvmod.datasets.settings import (
    CaptionColumns,
    CustomCaptionSettings,
    CustomSettings,
    CustomVQASettings,
    DataSettings,
    DigitsSettings,
    EasyVQASettings,
    FileSettings,
    ImagesSettings,
    InstructColumns,
    OfficialSettings,
    ProcessorSettings,
    SampleSettings,
    ShardSettings,
    SplitSettings,
    VideoSettings,
    VQAColumns,
)
from lavis_kvmod.demo.pages import PageSettings
from lavis_kvmod.models.settings import (
    Blip2OPTSettings,
    Blip2Settings,
    ImageSideSettings,
    ModelSettings,
    Stage1Settings,
)
from lavis_kvmod.runners.settings import NOT_READ, RunnerSettings, RunSettings
from lavis_kvmod.system.schema import Settings
from lavis_kvmod.tasks.settings import (
    TASK_SETTINGS,
    CaptioningSettings,
    GenerationSettings,
    RetrievalSettings,
    VQASettings,
)

__all__ = ["TABLES", "Table", "run_defaults", "run_settings", "unread_keys"]

OUR_RUNNER = "runner_kvmod"


class Table(NamedTuple):
    """The keys of a class, as docs/settings.md shows them: those it declares itself, but for ``hidden`` ones."""

    section: str
    declared: Type[Settings]
    hidden: Any = ()


# Tables by the name that their place in the page has.
TABLES: Dict[str, Table] = {
    "model-lavis": Table("model", Blip2Settings, ("arch",)),
    "model-lavis-opt": Table("model", Blip2OPTSettings, ("apply_lemmatizer",)),
    "model": Table("model", ImageSideSettings),
    "model-opt": Table("model", ModelSettings),
    "model-stage-1": Table("model", Stage1Settings, ("arch",)),
    "run-lavis": Table("run", RunSettings),
    "run": Table("run", RunnerSettings),
    "generation": Table("run", GenerationSettings),
    "kvmod_vqa": Table("run", VQASettings),
    "kvmod_captioning": Table("run", CaptioningSettings),
    "kvmod_retrieval": Table("run", RetrievalSettings),
    "data": Table("datasets", DataSettings),
    "data-build-info": Table("datasets", FileSettings),
    "data-images": Table("datasets", ImagesSettings),
    "data-split": Table("datasets", SplitSettings),
    "data-processors": Table("datasets", ProcessorSettings),
    "data-samples": Table("datasets", SampleSettings),
    "custom": Table("datasets", CustomSettings),
    "videos": Table("datasets", VideoSettings),
    "custom_vqa": Table("datasets", CustomVQASettings),
    "custom_vqa-columns": Table("datasets", VQAColumns),
    "custom_caption": Table("datasets", CustomCaptionSettings),
    "custom_caption-columns": Table("datasets", CaptionColumns),
    "custom_instruct-columns": Table("datasets", InstructColumns),
    "vqav2": Table("datasets", OfficialSettings),
    "shards": Table("datasets", ShardSettings),
    "digits": Table("datasets", DigitsSettings),
    "digits_pages": Table("datasets", PageSettings),
    "easy_vqa": Table("datasets", EasyVQASettings),
}


def run_settings(run: Mapping[str, Any]) -> List[Type[Settings]]:
    """The classes whose keys are read in a run: its runner's and its task's (LAVIS's may read what ours do)."""
    runner = RunnerSettings if run.get("runner") == OUR_RUNNER else RunSettings
    return [runner, TASK_SETTINGS.get(str(run.get("task")), GenerationSettings)]


def run_defaults() -> Dict[str, Any]:
    """The values of LAVIS's keys where a run file says nothing."""
    return {key.name: key.default for key in RunSettings.keys() if key.default is not None}


def unread_keys(run: Mapping[str, Any]) -> List[str]:
    """The keys of a run section that nothing reads in this run, with the reason or the key that may be meant."""
    known = {name for declared in run_settings(run) for name in declared.model_fields}
    runners = {name: f"{OUR_RUNNER} alone reads it" for name in RunnerSettings.model_fields}
    tasks = {
        name: f"task {task} alone reads it"
        for task, declared in TASK_SETTINGS.items()
        for name in declared.model_fields
    }
    elsewhere = {**tasks, **NOT_READ, **runners}
    if run.get("task") not in TASK_SETTINGS:  # LAVIS's, or a user's own: it may read what ours do
        known |= {*tasks, *NOT_READ}
    told = []
    for name in run:
        if name in known:
            continue
        if name in elsewhere:
            told.append(f"run.{name}: changes nothing here, {elsewhere[name]}")
            continue
        close = difflib.get_close_matches(name, {*known, *elsewhere}, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        told.append(f"run.{name}: not a key that LAVIS or lavis-kvmod reads{hint}")
    return told
