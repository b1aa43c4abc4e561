"""A study's results for people: ``report.md`` for a repository, ``report.html`` as one page that needs no network."""

import html
import json
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from lavis_kvmod.reports.markdown import escape
from lavis_kvmod.reports.markdown import table as markdown_table

__all__ = ["study_html", "study_markdown"]

Summary = Mapping[str, Any]


class _Section(NamedTuple):
    """A heading, sentences below it, and maybe a table (its head, its rows, in plain text)."""

    title: str
    sentences: Sequence[str]
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


def study_markdown(summary: Summary) -> str:
    """The report in Markdown."""
    lines = [f"# {escape(summary['study'])}", "", escape(summary["about"], longest=2000), ""]
    for section in _sections(summary):
        lines += [f"## {escape(section.title)}", ""]
        lines += [line for sentence in section.sentences for line in (escape(sentence, longest=2000), "")]
        if section.rows:
            rows = [[escape(cell) for cell in row] for row in section.rows]
            lines += [markdown_table(section.head, rows, right=range(2, len(section.head))), ""]
    return "\n".join(lines).rstrip() + "\n"


def study_html(summary: Summary) -> str:
    """The report as one HTML page, with a picture of the primary metric by arm."""
    parts = [f"<h1>{html.escape(summary['study'])}</h1><p>{html.escape(summary['about'])}</p>"]
    for i, section in enumerate(_sections(summary)):
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        parts += [f"<p>{html.escape(sentence)}</p>" for sentence in section.sentences]
        if i == 0:
            parts.append(_picture(summary))
        if section.rows:
            parts.append(_html_table(section.head, section.rows))
    style = (
        "body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse}td,th{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:right}"
        "td:nth-child(-n+2),th:nth-child(-n+2){text-align:left}svg{max-width:100%}"
    )
    head = f'<meta charset="utf-8"><title>{html.escape(summary["study"])}</title><style>{style}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


# ---------------------------------------------------------------- what is said


def _sections(summary: Summary) -> List[_Section]:
    primary = summary["primary"]
    arms: Dict[str, Any] = summary["arms"]
    by_type = [metric for metric in _metrics(summary) if metric.startswith("question_type/")]
    by_need = [metric for metric in _metrics(summary) if metric not in by_type]
    sections = [
        _Section("What was fixed before", [_primary_sentence(summary)]),
        _accuracies("Accuracy by what a question needs", summary, by_need),
        _differences(f"Difference to {primary['against']}", summary, by_need),
        _Section("Where the arms agree", [_agreement(summary, by_need)]),
        _accuracies("Accuracy by type of question", summary, by_type),
        _use_section(summary, by_need),
        _costs_section(arms),
    ]
    if summary.get("dose"):
        sections.insert(1, _dose_section(summary))
    if summary.get("gains"):
        sections.insert(1, _gains_section(summary))
    if any(summary.get("probes", {}).values()):
        sections.append(_probes_section(summary))
    if summary["shows_not"]:
        sections.append(_Section("What this does not show", summary["shows_not"]))
    return [section for section in sections if section.rows or section.sentences]


def _metrics(summary: Summary) -> List[str]:
    return list(next(iter(summary["arms"].values()))["accuracy"])


def _primary_sentence(summary: Summary) -> str:
    primary = summary["primary"]
    gain = primary["difference"]
    verdict = "The interval leaves 0 out." if gain["tells_apart"] else "The interval holds 0: no difference is shown."
    return (
        f"The study asks for {_name(primary['metric'])} of {primary['arm']} against {primary['against']}: "
        f"{_signed(gain)} points. {verdict} {_seeds(summary)}, {summary['questions']:,} questions about "
        f"{summary['images']:,} images of the split {summary['split']}; {100 * summary['confidence']:g} % bootstrap "
        "intervals over seeds and images, paired where arms are compared. All other figures are there to look at."
    )


def _seeds(summary: Summary) -> str:
    count = len(summary["seeds"])
    return "1 seed" if count == 1 else f"{count} seeds"


def _accuracies(title: str, summary: Summary, metrics: Sequence[str]) -> _Section:
    rows = [
        [name, arm["about"], *(_with_interval(arm["accuracy"][metric]) for metric in metrics)]
        for name, arm in summary["arms"].items()
    ]
    blind = ["", "who sees nothing: each type's commonest answer", *(f"{summary['commonest'][m]:.1f}" for m in metrics)]
    sentence = "Per cent right: mean over seeds, interval in brackets, standard deviation over seeds after ±."
    return _Section(
        title, [sentence] if metrics else [], ["arm", "", *map(_name, metrics)], [*rows, blind] if metrics else []
    )


def _differences(title: str, summary: Summary, metrics: Sequence[str]) -> _Section:
    rows = [
        [
            name,
            arm["about"],
            *(_signed(arm["difference"][m]) + ("" if arm["difference"][m]["tells_apart"] else " ·") for m in metrics),
        ]
        for name, arm in summary["arms"].items()
        if name != summary["primary"]["against"]
    ]
    return _Section(title, ["Points; a dot marks an interval that holds 0."], ["arm", "", *map(_name, metrics)], rows)


def _agreement(summary: Summary, metrics: Sequence[str]) -> str:
    arms = {name: arm for name, arm in summary["arms"].items() if name != summary["primary"]["against"]}
    alike = [m for m in metrics if not any(arm["difference"][m]["tells_apart"] for arm in arms.values())]
    if not alike:
        return "On each class of questions some arm differs from the one compared with."
    return f"On {', '.join(map(_name, alike))} no arm differs from that one: this data cannot tell them apart."


def _use_section(summary: Summary, metrics: Sequence[str]) -> _Section:
    rows = []
    for name, arm in summary["arms"].items():
        use = {metric: arm["use"][metric] for metric in metrics}
        if use[metrics[0]] is not None:
            share = arm["attention_share"]
            cells = [_use(use[metric]) for metric in metrics]
            rows.append([name, arm["about"], *cells, "" if share is None else f"{100 * share:.1f} %"])
    sentence = (
        "Each trained model was asked again with another image's prefix. First the share of its accuracy that this "
        "costs (conditional utilisation rate, arXiv 2507.03262), then the change of the right answer's "
        "log-probability. Last the prefix's share of the Q-Former's attention: where it looks, not what it uses."
    )
    return _Section(
        "Is the prefix used?", [sentence] if rows else [], ["arm", "", *map(_name, metrics), "attention"], rows
    )


# Of `lavis_kvmod.studies.costs`: head, and from a value to text.
_COSTS: Dict[str, Tuple[str, Callable[[float], str]]] = {
    "soft_prompt": ("tokens into the language model", "{:.0f}".format),
    "step_seconds": ("step, ms", lambda seconds: f"{1e3 * seconds:.0f}"),
    "answer_seconds": ("an answer, ms", lambda seconds: f"{1e3 * seconds:.2f}"),
    "peak_memory_gib": ("memory of a step, MiB", lambda gib: f"{1024 * gib:.0f}"),
}


def _costs_section(arms: Mapping[str, Any]) -> _Section:
    rows = []
    for name, arm in arms.items():
        costs = arm.get("costs") or {}
        told = ["" if costs.get(key) is None else in_words(costs[key]) for key, (_, in_words) in _COSTS.items()]
        rows.append([name, arm["about"], f"{arm['trained_parameters']:,}", *told, f"{arm['seconds']:.0f}"])
    sentence = (
        "A step is the forward and backward pass of a batch, without the encoders where their features are remembered; "
        "memory is what such a step holds at most, with weights, gradients and AdamW's numbers. Seconds are a "
        "training's with its measurements. Times are of the machine where it ran, beside the others."
    )
    heads = [head for head, _ in _COSTS.values()]
    return _Section("Costs", [sentence], ["arm", "", "trained parameters", *heads, "seconds"], rows)


def _dose_section(summary: Summary) -> _Section:
    dose, metric = summary["dose"], _name(summary["primary"]["metric"])
    line = dose["line"]
    told = "The points determine no line."
    if line is not None:
        told = (
            f"Slope {line['slope']:+.3f} points for each unit of dose, {line['at_zero']:.1f} at dose 0, "
            f"R² {line['r_squared']:.2f}."
        )
    rows = [
        [p["arm"], summary["arms"][p["arm"]]["about"], f"{p['dose']:g}", f"{p['accuracy']:.1f}"] for p in dose["points"]
    ]
    return _Section("Dose and response", [told], ["arm", "", "dose", metric], rows)


def _gains_section(summary: Summary) -> _Section:
    gains, line = summary["gains"], summary["gains"]["line"]
    told = "The points determine no line."
    if line is not None:
        told = (
            f"A line through them: {line['slope']:+.2f} points of gain for each point that the probe of the second "
            f"encoder is ahead, {line['at_zero']:+.1f} where it is not ahead, R² {line['r_squared']:.2f}."
        )
    rows = [
        [p["arm"], summary["arms"][p["arm"]]["about"], p["against"], f"{p['gap']:+.1f}", _signed(p["gain"])]
        for p in gains["points"]
    ]
    metric = _name(summary["primary"]["metric"])
    return _Section("The gain, and what the first encoder lacks", [told], ["arm", "", "against", "gap", metric], rows)


def _probes_section(summary: Summary) -> _Section:
    """Arms with the same encoders have the same probes: they share a row."""
    by_probes: Dict[str, List[str]] = {}
    for name, probes in summary["probes"].items():
        if probes:
            by_probes.setdefault(json.dumps(probes), []).append(name)
    kinds = list(dict.fromkeys(kind for probes in summary["probes"].values() for kind in probes))
    rows = []
    for told, names in by_probes.items():
        probes = json.loads(told)
        for encoder, title in (("vit", "image encoder"), ("aux", "second encoder")):
            if any(encoder in knows for knows in probes.values()):
                cells = [f"{probes[k][encoder]:.1f}" if encoder in probes.get(k, {}) else "" for k in kinds]
                rows.append([", ".join(names), title, *cells])
    sentence = (
        "Per cent that a linear probe reads from the frozen features alone, of types whose question is always the "
        "same: of the image encoder from the mean of its tokens, of the second from its pooled features."
    )
    return _Section("What each encoder knows", [sentence], ["arms", "", *kinds], rows)


def _name(metric: str) -> str:
    return metric.partition("/")[2] or metric


def _with_interval(value: Mapping[str, Any]) -> str:
    spread = "" if value["sd"] is None else f" ± {value['sd']:.1f}"
    return f"{value['mean']:.1f}{spread} ({value['low']:.1f} … {value['high']:.1f})"


def _signed(value: Mapping[str, Any]) -> str:
    return f"{value['mean']:+.1f} ({value['low']:+.1f} … {value['high']:+.1f})"


def _use(value: Mapping[str, Any]) -> str:
    rate: Optional[float] = value["utilisation"]
    change = value["log_prob"]
    told = "none right" if rate is None else f"{100 * rate:.1f} %"
    return told + ("" if change is None else f", {change['mean']:+.2f}")


# ---------------------------------------------------------------- the page


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _picture(summary: Summary) -> str:
    """Each arm's primary metric as a dot with its interval, on a scale from 0 to 100 per cent."""
    metric = summary["primary"]["metric"]
    left, width, line = 330, 600, 28
    rows = []
    for i, (name, arm) in enumerate(summary["arms"].items()):
        value, y = arm["accuracy"][metric], 20 + i * line
        low, mean, high = (left + width * value[key] / 100 for key in ("low", "mean", "high"))
        label = html.escape(f"{name} {arm['about']}"[:44])
        rows.append(
            f'<text x="{left - 12}" y="{y + 5}" text-anchor="end" font-size="13">{label}</text>'
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}" stroke="#357" stroke-width="3"/>'
            f'<circle cx="{mean:.1f}" cy="{y}" r="5" fill="#357"/>'
        )
    height = 20 + len(rows) * line
    marks = "".join(
        f'<line x1="{left + width * at / 100}" x2="{left + width * at / 100}" y1="4" y2="{height}" stroke="#ddd"/>'
        f'<text x="{left + width * at / 100}" y="{height + 16}" text-anchor="middle" font-size="12">{at} %</text>'
        for at in (0, 25, 50, 75, 100)
    )
    title = html.escape(f"{_name(metric)}, per cent right")
    view = f'viewBox="0 0 {left + width + 30} {height + 24}" width="{left + width + 30}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{title}" {view}>{marks}{"".join(rows)}</svg>'
    )
