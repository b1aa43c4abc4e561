"""A study's file: its arms, its seeds, and the one comparison that was chosen before anything was seen."""

import hashlib
import json
from pathlib import Path
from typing import Any, Callable, Dict, List, Literal, Mapping, NamedTuple, Sequence, Type

import yaml

from lavis_kvmod.system.paths import expanded, resource
from lavis_kvmod.system.schema import ConfigurationError, Settings, key, not_known

__all__ = ["Arm", "Member", "Primary", "Study", "StudySettings", "load_study"]

# What the frozen encoders' features do not hang on. All else may change them, so that what is forgotten here costs time
# and no mistake.
_AFTER_FEATURES = (
    *("num_prefix_tokens", "prefix_gate", "prefix_sharing", "num_query_token", "qformer_geometry", "connector"),
    *("connector_geometry", "aux_fusion", "num_aux_tokens", "prefix_dropout", "opt_model", "opt_precision", "prompt"),
    *("fusion", "gated_every", "qformer_text_input", "bert_model"),
    *("max_txt_len", "answer_loss", "model_type"),
    *("feature_cache_gib", "opt_grad_checkpoint"),
)


class ArmSettings(Settings):
    """An arm of a study."""

    about: str = key("", "what it is, in words")
    options: Dict[str, Any] = key({}, "values of the run file that are its own: `section.key: value`")


class PrimarySettings(Settings):
    """The comparison that was fixed before the study."""

    metric: str = key("overall", "`overall`, `question_type/NAME` or `answer_type/NAME`")
    arm: str = key("", "the arm of which a gain is claimed")
    against: str = key("", "the arm that it is compared with")


class StudySettings(Settings):
    """The keys of a study's file."""

    about: str = key("", "what is asked, in words")
    shows_not: List[str] = key([], "what its results do not show, a sentence each")
    seeds: List[int] = key([1, 2, 3, 4, 5], "each arm is trained with each of them")
    options: Dict[str, Any] = key({}, "values of the run file that all arms have: `section.key: value`")
    arms: Dict[str, Any] = key({}, "name: `{about, options}`", expected="a table")
    primary: Dict[str, Any] = key({}, "`{metric, arm, against}`", expected="a table")
    dose: Dict[str, float] = key({}, "an arm's dose, where the arms are doses of one thing")
    gains: Dict[str, str] = key(
        {},
        "`arm: against`, pairs whose difference is laid over what the second encoder knows and the first does not: by "
        "how much a linear probe of its features reads the answers better",
    )
    split: str = key("test", "the split that is compared on")
    resamples: int = key(2000, "of the bootstrap", gt=99)
    confidence: float = key(0.95, "of the intervals", gt=0, lt=1)
    kind: Literal["study"] = key("study", "so that the file says what it is")


class Arm(NamedTuple):
    """A named set of overrides, as ``--options`` of a run: those of all arms, then its own."""

    name: str
    about: str
    options: List[str]


class Primary(NamedTuple):
    """The comparison fixed in the file."""

    metric: str
    arm: str
    against: str


class Member(NamedTuple):
    """One training: an arm with a seed; the run file's path; where it goes; which features it has."""

    arm: str
    seed: int
    cfg_path: str
    options: List[str]
    folder: Path
    features: str
    split: str


class Study(NamedTuple):
    """A study that can be run: all of it has been checked."""

    name: str
    cfg_path: str
    settings: StudySettings
    arms: List[Arm]
    primary: Primary

    def members(self, output: Path, configs: Mapping[str, Any]) -> List[Member]:
        """All trainings, seed by seed, so that the arms can be compared as soon as a seed is through.

        Args:
            configs: an arm's merged run file; with other values a member has another folder, and is trained anew.
        """
        return [
            Member(
                arm.name,
                seed,
                self.cfg_path,
                [*arm.options, f"run.seed={seed}"],
                output / "runs" / f"{arm.name}-seed{seed}-{_digest(_without_place(configs[arm.name]))}",
                _digest(_of_features(configs[arm.name])),
                self.settings.split,
            )
            for seed in self.settings.seeds
            for arm in self.arms
        ]


def load_study(path: str, cfg_path: str, load_config: Callable[..., Any], options: Sequence[str] = ()) -> Any:
    """Read and check a study with its run file; all problems of all arms are told at once.

    Args:
        path: of the study's YAML; ``studies/…`` is also looked up among the shipped ones.
        cfg_path: of the run file.
        load_config: gives a run file's checked config, or raises ConfigurationError.
        options: ``section.key=value``, for all arms, before the arms' own.

    Returns:
        The `Study`, and each arm's config as a plain dict.

    Raises:
        ConfigurationError: listing all that is wrong.
        FileNotFoundError: if there is no such file.
    """
    file = expanded(path)
    if not file.is_file() and path.startswith("studies/"):
        file = resource(path)
    if not file.is_file():
        raise FileNotFoundError(f"expected a study's YAML file, got {path!r}, which is not there")
    settings, problems = _read(file)
    arms = _arms(settings, problems, options)
    primary = _primary(settings, problems)
    configs: Dict[str, Any] = {}
    for arm in arms if not problems else []:
        try:
            configs[arm.name] = plain_config(load_config(cfg_path, arm.options))
        except ConfigurationError as error:
            problems += [f"arms.{arm.name}: {told}" for told in error.problems]
    problems += [] if problems else _split_problems(settings, configs)
    if problems:
        raise ConfigurationError(file, list(dict.fromkeys(problems)))
    return Study(file.stem, cfg_path, settings, arms, primary), configs


def plain_config(cfg: Any) -> Dict[str, Any]:
    """A checked config as plain values."""
    from omegaconf import OmegaConf

    plain: Any = OmegaConf.to_container(cfg.config, resolve=True)
    return plain


# ---------------------------------------------------------------- checks


def _read(file: Path) -> Any:
    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(file, [f"not valid YAML: {error}"]) from error
    if not isinstance(given, dict):
        raise ConfigurationError(file, ["expected a table with arms, seeds and primary"])
    return _checked(StudySettings, given, "")


def _checked(declared: Type[Settings], given: Any, place: str) -> Any:
    if not isinstance(given, dict):
        return declared(), [f"{place.rstrip('.')}: expected a table, got {given!r}"]
    unknown = [
        f"{place}{not_known(str(name), declared.model_fields)}" for name in given if name not in declared.model_fields
    ]
    settings, problems = declared.check(given)
    return settings, [*unknown, *(f"{place}{problem}" for problem in problems)]


def _arms(settings: StudySettings, problems: List[str], options: Sequence[str]) -> List[Arm]:
    arms = []
    for name, given in settings.arms.items():
        arm, found = _checked(ArmSettings, given if given is not None else {}, f"arms.{name}.")
        problems += found
        if not str(name).replace("_", "").replace("-", "").replace(".", "").isalnum():
            problems.append(f"arms.{name}: a name is letters, digits, '-', '_' and '.', since it names a folder")
        chosen = {**settings.options, **arm.options}
        arms.append(
            Arm(
                str(name),
                arm.about,
                [
                    *(_option(k, v) for k, v in settings.options.items()),
                    *options,
                    *(_option(k, v) for k, v in arm.options.items()),
                ],
            )
        )
        problems += [f"arms.{name}.options: expected section.key, got {k!r}" for k in chosen if "." not in str(k)]
    if len(arms) < 2:
        problems.append(f"arms: expected two or more, got {len(arms)}: there is nothing to compare")
    if not settings.seeds or len(set(settings.seeds)) < len(settings.seeds):
        problems.append(f"seeds: expected whole numbers, each once, got {settings.seeds}")
    unknown = [name for name in settings.dose if name not in settings.arms]
    problems += [f"dose: {not_known(name, settings.arms, 'no arm of this study')}" for name in unknown]
    unknown = [name for pair in settings.gains.items() for name in pair if name not in settings.arms]
    problems += [f"gains: {not_known(name, settings.arms, 'no arm of this study')}" for name in unknown]
    return arms


def _option(name: Any, value: Any) -> str:
    return f"{name}={json.dumps(value)}" if not isinstance(value, str) else f"{name}={value}"


def _primary(settings: StudySettings, problems: List[str]) -> Primary:
    primary, found = _checked(PrimarySettings, settings.primary, "primary.")
    problems += found
    for name in ("arm", "against"):
        if getattr(primary, name) not in settings.arms:
            problems.append(
                f"primary.{name}: {not_known(getattr(primary, name), settings.arms, 'no arm of this study')}"
            )
    if primary.metric != "overall" and not primary.metric.startswith(("question_type/", "answer_type/")):
        problems.append(
            f"primary.metric: expected overall, question_type/NAME or answer_type/NAME, got {primary.metric!r}"
        )
    return Primary(primary.metric, primary.arm, primary.against)


def _split_problems(settings: StudySettings, configs: Mapping[str, Any]) -> List[str]:
    return [
        f"split: {settings.split!r} is not among the run.test_splits of arm {name}"
        for name, config in configs.items()
        if settings.split not in (config["run"].get("test_splits") or [])
    ]


# ---------------------------------------------------------------- what hangs on what


def _without_place(config: Mapping[str, Any]) -> Any:
    run = {name: value for name, value in config["run"].items() if name not in ("output_dir", "seed", "num_workers")}
    return {**config, "run": run}


def _of_features(config: Mapping[str, Any]) -> Any:
    """What the frozen encoders say of an image hangs on: the model section without what comes after, and the data."""
    model = {name: value for name, value in config["model"].items() if name not in _AFTER_FEATURES}
    if model.get("prefix_control") != "untrained":  # the others are made of the same features
        model.pop("prefix_control", None)
    return {"model": model, "datasets": config.get("datasets")}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:10]
