"""``lavis-kvmod list``: everything that a run file can name, section by section."""

import argparse
import inspect
import json
from fnmatch import fnmatchcase
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

from lavis_kvmod.system.paths import run_files
from lavis_kvmod.system.registry import Registry


class Named(NamedTuple):
    """A name, and a line about it."""

    name: str
    meaning: str = ""


class Section(NamedTuple):
    """A kind of thing, where its names go, and the names that fit a pattern (None: those that are ours)."""

    title: str
    key: str
    names: Callable[[Optional[str]], List[Named]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("section", nargs="?", choices=tuple(SECTIONS), help="one of them; all by default")
    parser.add_argument(
        "pattern", nargs="?", help='names that fit, such as "timm:*b3*" or "*caption*" (LAVIS\'s own are searched too)'
    )
    parser.add_argument("--json", action="store_true", help="as JSON: section -> names")


def main(args: argparse.Namespace) -> int:
    """Print the names; returns the exit status: 1 if none fits the pattern."""
    sections = [args.section] if args.section else list(SECTIONS)
    found = {name: SECTIONS[name].names(args.pattern) for name in sections}
    if args.json:
        print(json.dumps({name: [named.name for named in names] for name, names in found.items()}, indent=2))
    elif args.section:
        print(_lines(found[args.section]) or f"no name fits {args.pattern}")
    else:
        print("\n\n".join(f"{_title(SECTIONS[name])}\n{_lines(names, '  ')}" for name, names in found.items()))
    return 0 if any(found.values()) else 1


def _title(section: Section) -> str:
    return f"{section.title} ({section.key})"


def _lines(names: Sequence[Named], indent: str = "") -> str:
    width = max((len(named.name) for named in names), default=0)
    return "\n".join(f"{indent}{named.name:<{width}}  {named.meaning}".rstrip() for named in names)


# ------------------------------------------------------------ the sections


def _model_types(pattern: Optional[str]) -> List[Named]:
    return [
        Named(f"{name} {model_type}", "the default" if model_type == _default_type(cls) else "")
        for name, cls in _in_lavis("model", pattern=None if pattern is None else "*").items()
        for model_type in getattr(cls, "PRETRAINED_MODEL_CONFIG_DICT", {})
        if pattern is None or fnmatchcase(f"{name} {model_type}", pattern)
    ]


def _default_type(cls: type) -> Optional[str]:
    return getattr(cls, "default_model_type", None)


def _image_encoders(pattern: Optional[str]) -> List[Named]:
    from lavis_kvmod.models.vision.encoders import VISION_ENCODERS

    return _of_registry(VISION_ENCODERS, pattern, lambda name: VISION_ENCODERS[name].build)


def _auxiliary(pattern: Optional[str]) -> List[Named]:
    from lavis_kvmod.models.vision.auxiliary import AUXILIARY_ENCODERS

    return _of_registry(AUXILIARY_ENCODERS, pattern)


def _connectors(pattern: Optional[str]) -> List[Named]:
    from lavis_kvmod.models.connectors import CONNECTORS

    return _of_registry(CONNECTORS, pattern, lambda name: CONNECTORS[name].build)


def _metrics(pattern: Optional[str]) -> List[Named]:
    from lavis_kvmod.tasks.caption_metrics import METRICS

    answers = Named("overall", "accuracy of answers: VQA's soft one, exact match where few people answered")
    captions = [Named(name, "of captions; run.caption_metrics chooses") for name in METRICS]
    return _fitting([answers, *captions], pattern)


def _run_files(pattern: Optional[str]) -> List[Named]:
    return _fitting([Named(path) for path in run_files()], pattern)


def _registered(kind: str) -> Callable[[Optional[str]], List[Named]]:
    """Tasks or builders in LAVIS's registry."""

    def names(pattern: Optional[str]) -> List[Named]:
        return [
            Named(name, _first_line(cls).replace(f"{name}: ", "", 1)) for name, cls in _in_lavis(kind, pattern).items()
        ]

    return names


SECTIONS: Dict[str, Section] = {
    "models": Section("models and their types", "model.arch, model.model_type", _model_types),
    "image-encoders": Section("image encoders", "model.vit_model", _image_encoders),
    "auxiliary": Section("auxiliary encoders", "model.aux_encoder", _auxiliary),
    "connectors": Section("connectors", "model.connector", _connectors),
    "tasks": Section("tasks", "run.task", _registered("task")),
    "builders": Section("data sets", "datasets", _registered("builder")),
    "metrics": Section("metrics", "docs/metrics.md", _metrics),
    "run-files": Section("run files", "--cfg-path", _run_files),
}


def _of_registry(
    registry: "Registry[Any]", pattern: Optional[str], documented: Optional[Callable[[str], object]] = None
) -> List[Named]:
    names = registry.search(pattern)
    return [Named(name, _first_line(documented(name)) if documented else "") for name in names]


def _in_lavis(kind: str, pattern: Optional[str]) -> Dict[str, type]:
    """What LAVIS's registry has of a kind; without a pattern what is not LAVIS's own."""
    import lavis  # noqa: F401  (fills the registry, ours included)

    from lavis_kvmod.system.lavis_paths import lavis_registry

    known = lavis_registry().mapping[f"{kind}_name_mapping"]
    if pattern is None:
        return {name: cls for name, cls in known.items() if not cls.__module__.startswith("lavis.")}
    return {name: cls for name, cls in known.items() if fnmatchcase(name, pattern)}


def _fitting(names: List[Named], pattern: Optional[str]) -> List[Named]:
    return [named for named in names if pattern is None or fnmatchcase(named.name, pattern)]


def _first_line(documented: object) -> str:
    doc = inspect.cleandoc(getattr(documented, "__doc__", None) or "")
    return " ".join(doc.partition("\n\n")[0].split()).replace("``", "").partition(". ")[0].rstrip(".:")
