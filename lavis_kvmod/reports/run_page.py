"""``report.html``: a run on one page, or several beside each other, for reading. One file, no script, no network."""

import base64
import io
import json
import logging
import math
from collections import defaultdict
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from lavis_kvmod.models.parts import PartSummary
from lavis_kvmod.reports.charts import Points, calibration_chart, line_chart
from lavis_kvmod.reports.evaluation import columns_of
from lavis_kvmod.reports.examples import choose, thumbnail
from lavis_kvmod.reports.run_files import PARTS_FILE, PICTURES_FILE, Run, read_run
from lavis_kvmod.tasks.evaluation import Evaluated, Row
from lavis_kvmod.weights.files import whole_or_nothing

__all__ = ["PAGE", "calibration", "leave_page", "page", "write_page", "write_pictures"]

PAGE = "report.html"
GOODNESS = ("accuracy", "CIDEr", "exact_match")
BINS = 10
DIFFERENCES = 12  # questions shown that runs answer differently
_NO_METRIC = ("loss", "scored", "agg_metrics", "epoch", "best_epoch")
_OF_TRAINING = {
    "learning rate": ("lr",),
    "gradient norm": ("grad_norm", "grad_norm_max"),
    "share of attention that the prefix gets": ("prefix_attention_share",),
}


class Calibration(NamedTuple):
    """Whether a confidence of 0.8 is right 8 times of 10.

    ``bins``: mean confidence, share that is right, count. ``error``: the mean distance of the two, weighted by count
    (expected calibration error, arXiv 1706.04599).
    """

    bins: List[Tuple[float, float, int]]
    error: float


def calibration(rows: Sequence[Row]) -> Optional[Calibration]:
    """Of rows with a confidence and an accuracy (or exact match), in ten bins; None without any."""
    known = []
    for row in rows:
        right = row.get("accuracy", row.get("exact_match"))
        if isinstance(row.get("confidence"), (int, float)) and isinstance(right, (int, float)):
            known.append((float(row["confidence"]), float(right)))
    if not known:
        return None
    bins: Dict[int, List[Tuple[float, float]]] = defaultdict(list)
    for confidence, right in known:
        bins[min(BINS - 1, int(confidence * BINS))].append((confidence, right))
    found = [(_mean(c for c, _ in of), _mean(r for _, r in of), len(of)) for _, of in sorted(bins.items())]
    return Calibration(found, sum(abs(c - r) * n for c, r, n in found) / len(known))


def page(runs: Sequence[Run]) -> str:
    """The HTML of one run, or of several."""
    environment = Environment(
        loader=PackageLoader("lavis_kvmod", "reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = _figure
    names = _names(runs)
    return environment.get_template("run_page.html").render(
        names=names,
        several=len(runs) > 1,
        charts=_charts(runs, names),
        tables=_metric_tables(runs),
        calibrations=[_calibration_part(name, run) for name, run in zip(names, runs)],
        examples=_examples(runs[0]) if len(runs) == 1 else [],
        differences=_differences(runs) if len(runs) > 1 else [],
        settings=_different_settings(runs) if len(runs) > 1 else [],
        runs=list(zip(names, runs)),
    )


def write_page(runs: Sequence[Run], path: Path) -> Path:
    """Write the page of some runs, whole or not at all."""
    text = page(runs)
    with whole_or_nothing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def leave_page(
    folder: Path, parts: Sequence[PartSummary], evaluated: Mapping[str, Evaluated], datasets: Mapping[str, Any]
) -> Optional[Path]:
    """Write a run's page when it is over, into its folder; a failure is told, and ends nothing.

    Args:
        parts: of the model, kept for later pages.
        evaluated: what evaluations left, by split.
        datasets: by split, for the pictures of others.
    """
    try:
        with whole_or_nothing(folder / PARTS_FILE) as temporary:
            temporary.write_text(json.dumps([part._asdict() for part in parts], indent=1), encoding="utf-8")
        run = read_run(folder)
        at_hand = {
            split: evaluated.get(split) or Evaluated(rows, datasets[split], {}, GOODNESS)
            for split, rows in run.predictions.items()
            if split in evaluated or split in datasets
        }
        write_pictures(run, at_hand)
        return write_page([run], folder / PAGE)
    except Exception as error:  # whatever it is, the run is over and its results are there
        logging.warning("%s has no %s: %s: %s", folder, PAGE, type(error).__name__, error)
        return None


def write_pictures(run: Run, evaluated: Mapping[str, Evaluated]) -> None:
    """Keep the pictures of a run's examples beside it, while its data are at hand."""
    kept: Dict[str, Dict[str, str]] = {}
    for split, of_split in evaluated.items():
        for group in choose(_rows_with_pictures(of_split), GOODNESS):
            for row in group.rows:
                instance = str(row["instance_id"])
                if instance not in kept.setdefault(split, {}):
                    image = thumbnail(row, of_split)
                    if image is not None:
                        kept[split][instance] = _address(image)
    with whole_or_nothing(run.folder / PICTURES_FILE) as temporary:
        temporary.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    run.pictures = kept


def _rows_with_pictures(evaluated: Evaluated) -> List[Row]:
    """Of streamed data only the first samples' pictures were kept."""
    if not evaluated.pictures:
        return evaluated.rows
    return [row for row in evaluated.rows if row["instance_id"] in evaluated.pictures]


def _address(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


# ------------------------------------------------------------ the parts of the page


def _names(runs: Sequence[Run]) -> List[str]:
    """Names that tell the runs apart: their folders', with the one above where that is needed."""
    names = [run.name for run in runs]
    above = [run.folder.resolve().parent.name for run in runs]
    if len(set(above)) == len(runs) > 1:
        return above
    return names if len(set(names)) == len(runs) else [f"{a}/{n}" for a, n in zip(above, names)]


def _charts(runs: Sequence[Run], names: Sequence[str]) -> List[Markup]:
    """Curves over the epochs: of one run several facts in a chart, of several runs one fact."""
    splits = list(dict.fromkeys(split for run in runs for split in run.facts if split != "train"))
    groups: Dict[str, List[Tuple[str, str]]] = {"loss": [("train", "loss"), *((split, "loss") for split in splits)]}
    for split in splits:
        keys = dict.fromkeys(key for run in runs for line in run.facts.get(split, []) for key in line)
        for key in keys:
            if key in _NO_METRIC:
                continue
            group, _, kind = key.partition("/")
            groups.setdefault(f"{split}: {group.replace('_', ' ')}" if kind else f"{split}: metrics", []).append(
                (split, key)
            )
    for title, of_training in _OF_TRAINING.items():
        groups[title] = [("train", key) for key in of_training]
    charts = []
    for title, facts in groups.items():
        charts += _charts_of(title, facts, runs, names)
    return [chart for chart in charts if chart]


def _charts_of(title: str, facts: Sequence[Tuple[str, str]], runs: Sequence[Run], names: Sequence[str]) -> List[Markup]:
    if len(runs) == 1:
        curves: Dict[str, Points] = {_short(title, split, key): runs[0].curve(split, key) for split, key in facts}
        return [line_chart(title, curves)]
    return [
        line_chart(f"{split}: {key}", {name: run.curve(split, key) for name, run in zip(names, runs)})
        for split, key in facts
    ]


def _short(title: str, split: str, key: str) -> str:
    return split if title == "loss" else key.rpartition("/")[2]


def _metric_tables(runs: Sequence[Run]) -> List[Tuple[str, List[Tuple[str, List[Optional[float]]]]]]:
    """By split, each metric with its last value in each run."""
    splits = dict.fromkeys(split for run in runs for split in run.facts if split != "train")
    tables = []
    for split in splits:
        found = [run.metrics(split) for run in runs]
        keys = dict.fromkeys(key for metrics in found for key in metrics)
        tables.append((split, [(key, [metrics.get(key) for metrics in found]) for key in keys]))
    return tables


def _shown_split(run: Run) -> Optional[str]:
    """The split whose answers are shown: the last that has some, which is a test split where there is one."""
    return next(reversed(list(run.predictions)), None)


def _calibration_part(name: str, run: Run) -> Optional[Dict[str, Any]]:
    split = _shown_split(run)
    found = calibration(run.predictions[split]) if split else None
    if found is None:
        return None
    return {"name": name, "split": split, "chart": calibration_chart(found.bins), "error": found.error}


def _examples(run: Run) -> List[Dict[str, Any]]:
    split = _shown_split(run)
    if split is None:
        return []
    rows, pictures = run.predictions[split], run.pictures.get(split, {})
    columns, groups = columns_of(rows), choose(rows, GOODNESS)
    with_picture = [row for row in rows if str(row["instance_id"]) in pictures]
    if with_picture and not all(_picture(pictures, row) for group in groups for row in group.rows):
        groups = choose(with_picture, GOODNESS)  # of streamed data those of the first samples were kept
    return [
        {
            "title": f"{split}: {group.title}",
            "columns": columns,
            "rows": [(_picture(pictures, row), [_cell(row.get(name)) for name in columns]) for row in group.rows],
        }
        for group in groups
    ]


def _picture(pictures: Mapping[str, str], row: Row) -> str:
    address = pictures.get(str(row["instance_id"]), "")
    return address if address.startswith("data:image/jpeg;base64,") else ""


def _differences(runs: Sequence[Run]) -> List[Dict[str, Any]]:
    """Questions of the last common split that the runs answer with different success."""
    splits = [split for split in runs[0].predictions if all(split in run.predictions for run in runs)]
    if not splits:
        return []
    split = splits[-1]
    by_instance = [{str(row["instance_id"]): row for row in run.predictions[split]} for run in runs]
    found = []
    for instance, row in by_instance[0].items():
        others = [of_run.get(instance) for of_run in by_instance]
        if any(other is None or other.get("question") != row.get("question") for other in others):
            continue
        rights = [other.get("accuracy", other.get("exact_match")) for other in others if other]
        if len(set(rights)) > 1:
            pictures = [_picture(run.pictures.get(split, {}), row) for run in runs]
            found.append((next(filter(None, pictures), ""), row, [other for other in others if other]))
    found.sort(key=lambda item: not item[0])  # those with a picture first
    spread = found[:: max(1, len(found) // DIFFERENCES)][:DIFFERENCES]
    return [
        {
            "picture": picture,
            "question": row.get("question", ""),
            "truth": _cell(row.get("answers", row.get("references"))),
            "answers": [(o["prediction"], bool(o.get("accuracy", o.get("exact_match")))) for o in others],
        }
        for picture, row, others in spread
    ]


def _different_settings(runs: Sequence[Run]) -> List[Tuple[str, List[str]]]:
    """The keys of the configs that are not the same everywhere."""
    flat = [_flat(run.config) for run in runs]
    keys = dict.fromkeys(key for of_run in flat for key in of_run)
    values = {key: [of_run.get(key, "–") for of_run in flat] for key in keys}
    return [(key, of_key) for key, of_key in values.items() if len(set(of_key)) > 1]


def _flat(config: Any, prefix: str = "") -> Dict[str, str]:
    if not isinstance(config, dict):
        return {prefix: str(config)}
    return {
        key: value for name, of in config.items() for key, value in _flat(of, f"{prefix}.{name}".strip(".")).items()
    }


def _cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        counts = {str(item): list(map(str, value)).count(str(item)) for item in value}
        return " · ".join(f"{text} ×{count}" if count > 1 else text for text, count in counts.items())
    return "" if value is None else _figure(value)


def _figure(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "–" if value is None else str(value)
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)
