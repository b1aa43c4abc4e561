"""The keys that ``runner_kvmod`` reads beside LAVIS's, and what they may be; docs/training.md tells what they do."""

from typing import Any, Callable, Dict, List, Mapping, NamedTuple

from lavis_kvmod.runners.run_log import is_installed

__all__ = ["RUNNER_KEYS", "runner_problems"]


class _Kind(NamedTuple):
    expected: str
    holds: Callable[[Any], bool]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text; LAVIS's recipes write numbers so
        try:
            value = float(value)
        except ValueError:
            return False
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


_ABOVE_0 = _Kind("a whole number above 0", lambda value: _is_whole(value) and value > 0)
_FROM_0 = _Kind("a whole number from 0", lambda value: _is_whole(value) and value >= 0)
_POSITIVE = _Kind("a number above 0", lambda value: _is_number(value) and float(value) > 0)
_SWITCH = _Kind("true or false", lambda value: isinstance(value, bool))

RUNNER_KEYS: Dict[str, _Kind] = {
    "save_every_n_iters": _ABOVE_0,
    "keep_last": _ABOVE_0,
    "max_bad_steps": _FROM_0,
    "patience": _ABOVE_0,
    "max_grad_norm": _POSITIVE,
    "kv_lr_scale": _POSITIVE,
    "lr_layer_decay": _Kind("a number above 0, at most 1", lambda value: _is_number(value) and 0 < float(value) <= 1),
    "deterministic": _SWITCH,
    "fsdp": _SWITCH,
    "dist_timeout": _Kind("minutes, a number above 0", _POSITIVE.holds),
    "tensorboard": _Kind("true, false or auto", lambda value: isinstance(value, bool) or value == "auto"),
    "wandb": _Kind(
        "true, false or arguments of wandb.init", lambda value: isinstance(value, bool) or isinstance(value, Mapping)
    ),
}


def runner_problems(run: Mapping[str, Any]) -> List[str]:
    """What is wrong with these keys of a run section (plain values)."""
    problems = []
    for key, kind in RUNNER_KEYS.items():
        value = run.get(key)
        if value is not None and not kind.holds(value):
            problems.append(f"run.{key}: expected {kind.expected}, got {value!r}")
    if run.get("patience") is not None and not run.get("valid_splits"):
        problems.append("run.patience: it counts validations, and run.valid_splits is empty; set both, or neither")
    for key, wanted in (("tensorboard", run.get("tensorboard") is True), ("wandb", bool(run.get("wandb")))):
        if wanted and not is_installed(key):
            problems.append(f"run.{key}: {key} is not installed; pip install {key}, or set run.{key}=false")
    return problems
