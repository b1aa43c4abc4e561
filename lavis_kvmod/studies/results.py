"""From the answers of all trainings to figures: what each arm reaches, and what the difference to another is."""

from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence

import numpy as np

from lavis_kvmod.studies.statistics import Interval, Values, bootstrap, fit_line
from lavis_kvmod.studies.study import Study

__all__ = ["summarise"]

Result = Mapping[str, Any]


class _Answers(NamedTuple):
    """An arm's answers: its results by seed, and the questions they share."""

    results: Sequence[Result]
    questions: Sequence[Mapping[str, Any]]


def summarise(study: Study, results: Sequence[Result]) -> Dict[str, Any]:
    """Everything that a report of a study says, as plain values.

    Accuracies and their differences are in per cent, with bootstrap intervals over seeds and images.
    """
    arms = {arm.name: _answers([r for r in results if r["arm"] == arm.name]) for arm in study.arms}
    metrics = _metrics(next(iter(arms.values())).questions)
    primary = study.primary
    if primary.metric not in metrics:
        raise ValueError(f"primary.metric: {primary.metric!r} is not in the data, which has {', '.join(metrics)}")
    settings = dict(resamples=study.settings.resamples, confidence=study.settings.confidence)
    against = arms[primary.against]
    return {
        "study": study.name,
        "about": study.settings.about,
        "run_file": study.cfg_path,
        "seeds": study.settings.seeds,
        "split": study.settings.split,
        "confidence": study.settings.confidence,
        "questions": len(against.questions),
        "images": len({row["image"] for row in against.questions}),
        "primary": {
            **primary._asdict(),
            "difference": _difference(arms[primary.arm], against, primary.metric, settings),
        },
        "commonest": {metric: _commonest(against.questions, metric) for metric in metrics},
        "arms": {
            arm.name: {
                "about": arm.about,
                "options": arm.options,
                **_costs(arms[arm.name].results),
                "accuracy": {metric: _accuracy(arms[arm.name], metric, settings) for metric in metrics},
                "difference": {metric: _difference(arms[arm.name], against, metric, settings) for metric in metrics},
                "use": {metric: _use(arms[arm.name], metric, settings) for metric in metrics},
            }
            for arm in study.arms
        },
        "probes": {name: of_arm.results[0]["probes"] for name, of_arm in arms.items()},
        "dose": _dose(study, arms, settings),
        "gains": _gains(study, arms, settings),
        "shows_not": study.settings.shows_not,
    }


def _answers(results: Sequence[Result]) -> _Answers:
    ordered = sorted(results, key=lambda result: result["seed"])
    return _Answers(ordered, ordered[0]["questions"])


def _metrics(questions: Sequence[Mapping[str, Any]]) -> List[str]:
    names = {f"answer_type/{row['needs']}": None for row in questions if row.get("needs")}
    names.update({f"question_type/{row['type']}": None for row in questions if row.get("type")})
    return ["overall", *names]


def _of(questions: Sequence[Mapping[str, Any]], metric: str) -> List[int]:
    """The places of a metric's questions."""
    kind, _, name = metric.partition("/")
    key = {"overall": None, "answer_type": "needs", "question_type": "type"}[kind]
    return [i for i, row in enumerate(questions) if key is None or row.get(key) == name]


def _values(answers: _Answers, metric: str, key: str) -> np.ndarray:
    """(seeds, questions of the metric); what is not known is NaN."""
    places = _of(answers.questions, metric)
    rows = [[result["questions"][i].get(key) for i in places] for result in answers.results]
    return np.array(rows, float)


def _images(answers: _Answers, metric: str) -> np.ndarray:
    names = [answers.questions[i]["image"] for i in _of(answers.questions, metric)]
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return np.array([number[name] for name in names], int)


def _accuracy(answers: _Answers, metric: str, settings: Dict[str, Any]) -> Dict[str, Any]:
    values = 100 * _values(answers, metric, "right")
    return _plain(bootstrap(Values(values, _images(answers, metric)), **settings))


def _difference(answers: _Answers, against: _Answers, metric: str, settings: Dict[str, Any]) -> Dict[str, Any]:
    values = 100 * (_values(answers, metric, "right") - _values(against, metric, "right"))
    interval = bootstrap(Values(values, _images(against, metric)), **settings)
    return {**_plain(interval), "tells_apart": interval.tells_apart}


def _use(answers: _Answers, metric: str, settings: Dict[str, Any]) -> Optional[Dict[str, Any]]:
    """What another image's prefix costs: the share of the accuracy, and the right answer's log-probability."""
    right, swapped = _values(answers, metric, "right"), _values(answers, metric, "right_swapped")
    if np.isnan(swapped).any():
        return None
    lost = _values(answers, metric, "log_prob_swapped") - _values(answers, metric, "log_prob")
    known = not np.isnan(lost).any()
    return {
        "utilisation": float((right.mean() - swapped.mean()) / right.mean()) if right.mean() else None,
        "log_prob": _plain(bootstrap(Values(lost, _images(answers, metric)), **settings)) if known else None,
    }


def _costs(results: Sequence[Result]) -> Dict[str, Any]:
    shares = [result["attention_share"] for result in results if result["attention_share"] is not None]
    return {
        "trained_parameters": results[0]["trained_parameters"],
        "costs": _median_costs([result["costs"] for result in results if result.get("costs")]),
        "seconds": round(float(np.mean([result["seconds"] for result in results])), 1),
        "attention_share": round(float(np.mean(shares)), 4) if shares else None,
    }


def _median_costs(found: Sequence[Mapping[str, Any]]) -> Dict[str, Any]:
    """By name, the median over seeds, whose times are disturbed by what else runs."""
    names = list(found[0]) if found else []
    return {
        name: None if found[0][name] is None else round(float(np.median([one[name] for one in found])), 6)
        for name in names
    }


def _commonest(questions: Sequence[Mapping[str, Any]], metric: str) -> float:
    """What who knows each question type's commonest answer, and sees nothing, would have right, in per cent."""
    kinds: Dict[Any, Dict[str, int]] = {}
    for i in _of(questions, metric):
        row = questions[i]
        told = kinds.setdefault(row.get("type"), {})
        told[row["answer"]] = told.get(row["answer"], 0) + 1
    total = sum(sum(told.values()) for told in kinds.values())
    return round(100 * sum(max(told.values()) for told in kinds.values()) / total, 2)


def _dose(study: Study, arms: Mapping[str, _Answers], settings: Dict[str, Any]) -> Optional[Dict[str, Any]]:
    """The primary metric by dose, and the line through it."""
    if not study.settings.dose:
        return None
    metric = study.primary.metric
    points = [
        {"arm": name, "dose": dose, "accuracy": _accuracy(arms[name], metric, settings)["mean"]}
        for name, dose in study.settings.dose.items()
    ]
    line = fit_line([float(p["dose"]) for p in points], [float(p["accuracy"]) for p in points])
    return {"points": points, "line": None if line is None else line._asdict()}


def _gains(study: Study, arms: Mapping[str, _Answers], settings: Dict[str, Any]) -> Optional[Dict[str, Any]]:
    """By pair of arms: by how much a probe of the second encoder beats one of the first, and what the pair gains."""
    metric = study.primary.metric
    points = []
    for name, against in study.settings.gains.items():
        probes = [
            (knows["aux"] - knows["vit"], len(_of(arms[name].questions, f"question_type/{kind}")))
            for kind, knows in arms[name].results[0]["probes"].items()
            if "aux" in knows and metric in ("overall", f"question_type/{kind}")
        ]
        if probes:
            gap = sum(gap * count for gap, count in probes) / sum(count for _, count in probes)
            gain = _difference(arms[name], arms[against], metric, settings)
            points.append({"arm": name, "against": against, "gap": round(gap, 2), "gain": gain})
    if not points:
        return None
    line = fit_line([float(p["gap"]) for p in points], [float(p["gain"]["mean"]) for p in points])
    return {"points": points, "line": None if line is None else line._asdict()}


def _plain(interval: Interval) -> Dict[str, Any]:
    return {name: None if value is None else round(value, 3) for name, value in interval._asdict().items()}
