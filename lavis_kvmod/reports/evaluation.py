"""What ``python -m lavis.evaluate`` leaves behind: a table on the screen, ``metrics.json``, ``report.md``."""

import collections
import importlib.metadata
import platform
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence

from lavis_kvmod._version import __version__
from lavis_kvmod.reports.examples import choose, thumbnail
from lavis_kvmod.reports.markdown import escape, table
from lavis_kvmod.tasks.evaluation import Evaluated, Row
from lavis_kvmod.tasks.predictions import to_json
from lavis_kvmod.weights.files import whole_or_nothing

METRICS_FILE, REPORT_FILE, PICTURES = "metrics.json", "report.md", "report"
LEFT_OUT = "left_out"  # the key in a split's metrics that tells which are not there, and why
PROVENANCE = "provenance"  # the key in metrics.json beside the splits

_PACKAGES = ("salesforce-lavis", "torch", "transformers", "pycocoevalcap")
_TOKENISERS = {
    "ptb": "Captions were split into words by the Penn Treebank tokeniser, as in COCO's evaluation.",
    "simple": (
        "Captions were split into words by this package's simple tokeniser, since Java was not there: the figures do "
        "not compare exactly with published ones."
    ),
}

Metrics = Mapping[str, Any]


class Report(NamedTuple):
    """Everything that a report says.

    Attributes:
        metrics: by split.
        evaluated: by split, what the tasks of this package leave (others leave nothing, and there are no examples).
        provenance: see `provenance`.
    """

    metrics: Mapping[str, Metrics]
    evaluated: Mapping[str, Evaluated]
    provenance: Mapping[str, Any]


def provenance(cfg: Any, cfg_path: str, options: Sequence[str]) -> Dict[str, Any]:
    """What was evaluated, and with what; no dates, so that equal runs give equal files."""
    model, run = cfg.model_cfg, cfg.run_cfg
    key = "finetuned" if model.get("load_finetuned", True) and model.get("finetuned", None) else "pretrained"
    checkpoint = run.get("resume_ckpt_path", None) or model.get(key, None)  # loaded last
    versions = {name: _version(name) for name in _PACKAGES}
    return {
        "run_file": str(cfg_path),
        "options": list(options),
        "model": {"arch": model.arch, "model_type": model.get("model_type", None), "checkpoint": checkpoint},
        "task": run.task,
        "data": {name: section.get("type", "default") for name, section in cfg.datasets_cfg.items()},
        "versions": {"python": platform.python_version(), "lavis-kvmod": __version__, **versions},
    }


def _version(package: str) -> Optional[str]:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def text_table(metrics: Mapping[str, Metrics]) -> str:
    """The metrics of all splits side by side, for a terminal."""
    names = dict.fromkeys(name for of_split in metrics.values() for name in of_split)
    names.pop(LEFT_OUT, None)  # a sentence, which the log has
    cells = [["", *metrics], *([name, *(_figure(m.get(name, "")) for m in metrics.values())] for name in names)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(metrics) + 1)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in cells
    )


def write(report: Report, folder: Path) -> List[Path]:
    """Write ``metrics.json``, ``report.md`` and its pictures into ``folder``; each file whole or not at all.

    Returns:
        The paths of the first two.
    """
    content = {**report.metrics, PROVENANCE: {**report.provenance, "samples": _samples(report)}}
    pages = {METRICS_FILE: to_json(content), REPORT_FILE: _page(report, folder)}
    for name, text in pages.items():
        with whole_or_nothing(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [folder / name for name in pages]


def _samples(report: Report) -> Dict[str, int]:
    return {split: len(evaluated.rows) for split, evaluated in report.evaluated.items()}


def _page(report: Report, folder: Path) -> str:
    about = report.provenance
    model = about["model"]
    facts = {
        "model": " ".join(str(model[key]) for key in ("arch", "model_type") if model[key]),
        "checkpoint": model["checkpoint"] or "none",
        "run file": " ".join([about["run_file"], *about["options"]]),
        "task": about["task"],
        "data": ", ".join(about["data"]),
        "versions": ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version),
    }
    parts = [
        f"# Evaluation of {escape(facts['model'])}",
        table(["", ""], [[name, escape(value, longest=1000)] for name, value in facts.items()]),
    ]
    for split, metrics in report.metrics.items():
        parts.append(f"## {escape(split)}")
        evaluated = report.evaluated.get(split)
        if evaluated is not None:
            parts.append(f"{len(evaluated.rows)} predictions; scored: {metrics.get('scored', 'unknown')}.")
        if metrics.get("tokeniser") in _TOKENISERS:
            parts.append(_TOKENISERS[metrics["tokeniser"]])
        if LEFT_OUT in metrics:
            parts.append(f"Left out: {escape(metrics[LEFT_OUT])}.")
        figures = [[escape(name), escape(_figure(value))] for name, value in metrics.items() if name != LEFT_OUT]
        parts.append(table(["metric", "value"], figures, right=[1]))
        if evaluated is not None and evaluated.rows:
            parts += _examples(split, evaluated, folder)
    return "\n\n".join(parts) + "\n"


def _examples(split: str, evaluated: Evaluated, folder: Path) -> List[str]:
    """The Markdown of a split's examples; their pictures are written here."""
    parts: List[str] = []
    rows = evaluated.rows
    if evaluated.pictures and len(evaluated.pictures) < len(rows):
        rows = [row for row in rows if row["instance_id"] in evaluated.pictures]
        parts.append(f"The data were streamed: the examples are from the first {len(rows)} samples that were read.")
    columns = columns_of(rows)
    pictures: Dict[str, str] = {}  # by instance: an example may be in two groups
    for group in choose(rows, evaluated.goodness):
        lines = []
        for row in group.rows:
            if row["instance_id"] not in pictures:
                name = f"{_file_name(split)}_{len(pictures) + 1:02d}.jpg"
                pictures[row["instance_id"]] = _picture(row, evaluated, folder, name)
            lines.append([pictures[row["instance_id"]], *(_cell(row.get(name, "")) for name in columns)])
        parts += [f"### {escape(group.title)}", table(["", *map(escape, columns)], lines)]
    return parts


def _picture(row: Row, evaluated: Evaluated, folder: Path, name: str) -> str:
    image = thumbnail(row, evaluated)
    if image is None:
        return escape(row["image"])
    with whole_or_nothing(folder / PICTURES / name) as temporary, open(temporary, "wb") as file:
        image.save(file, "JPEG", quality=88)
    return f"![{escape(row['image'])}]({PICTURES}/{name})"


def columns_of(rows: Sequence[Row]) -> List[str]:
    """The columns of the examples: those of these that there are."""
    wanted = ("question", "answers", "references", "prediction", "accuracy", "CIDEr", "exact_match", "confidence")
    return [name for name in wanted if any(name in row for row in rows)]


def _cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):  # answers, some of them given by several people
        counted = collections.Counter(value).most_common()
        return "<br>".join(escape(text) + (f" ×{n}" if n > 1 else "") for text, n in counted)
    return escape(_figure(value))


def _file_name(split: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in split)


def _figure(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}"
    return str(value)
