"""How a key of a run file is declared: once, by the part that reads it, as a field of a `Settings` class.

    class PrefixSettings(Settings):
        num_prefix_tokens: int = key(8, "Key/Value positions in front of the visual tokens", gt=0)

Type, default and bounds are pydantic's; from them come the check of a run file with its messages, the values that the
part reads, and the table in docs/settings.md. Pydantic and not OmegaConf's structured configs: it knows bounds and
choices, tells all faults at once, and LAVIS brings it (through spaCy).
"""

import difflib
from pathlib import Path
from typing import (
    Any,
    ClassVar,
    Collection,
    Dict,
    List,
    Literal,
    Mapping,
    NamedTuple,
    Sequence,
    Tuple,
    Type,
    TypeVar,
    Union,
)
from typing import get_args as args_of
from typing import get_origin as origin_of

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo

DEMO_RUN_FILE = "projects/kvmod/demo_vqa.yaml"

SettingsType = TypeVar("SettingsType", bound="Settings")


class ConfigurationError(ValueError):
    """Everything that keeps a run from starting."""

    def __init__(self, cfg_path: Union[str, Path], problems: Sequence[str]):
        self.problems = list(problems)
        things = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(
            f"{cfg_path} cannot run here: {things}\n"
            + "\n".join(f"  - {problem}" for problem in problems)
            + f"\nTo see a run that needs no GPU, no download and no data: "
            f"python -m lavis.train --cfg-path {DEMO_RUN_FILE}"
        )


class SettingsError(ValueError):
    """Faults in a section of a run file, all of them, one a line."""

    def __init__(self, problems: Sequence[str], section: str = "model"):
        self.problems = list(problems)
        super().__init__(f"{section}:\n" + "\n".join(f"  - {problem}" for problem in problems))


class Key(NamedTuple):
    """A declared key: its name, its default, what it may be, in words, and what it means."""

    name: str
    default: Any
    expected: str
    meaning: str


def key(default: Any, meaning: str, *, expected: str = "", **bounds: Any) -> Any:
    """A field of a `Settings` class.

    Args:
        default: its value where a run file says nothing.
        meaning: one line for docs/settings.md, in its Markdown.
        expected: what it may be, in words; by default told from type and bounds.
        **bounds: pydantic's: ``gt``, ``ge``, ``lt``, ``le``, ``min_length``.
    """
    factory: Dict[str, Any] = {"default": default}
    if isinstance(default, (list, dict)):
        factory = {"default_factory": lambda: default.copy()}
    return Field(
        **factory, description=meaning, json_schema_extra={"expected": expected} if expected else None, **bounds
    )


class Settings(BaseModel):
    """The keys that a part reads of a section of a run file.

    A subclass declares them with `key`, and may find in `conflicts` what types and bounds cannot tell.

    Attributes:
        tables: what is declared of the keys inside a key that holds a table.
    """

    tables: ClassVar[Dict[str, Type["Settings"]]] = {}

    # `protected_namespaces`: LAVIS's key `model_type` looks like one of pydantic's own.
    # Validators are built at first use: `import lavis` reads no run file.
    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(), defer_build=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: Any) -> Any:
        """A number in quotes, as YAML 1.1 reads 1e-3, is a number; null is an empty list, or the default of a number or
        switch (but no path or name)."""
        wanted = cls.model_fields[info.field_name].annotation
        if value is None and not _allows(wanted, type(None)) and not _allows(wanted, str):
            return [] if origin_of(wanted) is list else cls.default_of(info.field_name)
        if isinstance(value, str) and _allows(wanted, float):
            try:
                return float(value)
            except ValueError:
                return value
        return value

    @classmethod
    def keys(cls, inherited: bool = True) -> List[Key]:
        """The declared keys in their order; with ``inherited`` off those alone that the class itself declares."""
        return [
            Key(name, field.get_default(call_default_factory=True), _expected(field), field.description or "")
            for name, field in cls.model_fields.items()
            if inherited or name in cls.__dict__.get("__annotations__", {})
        ]

    @classmethod
    def default_of(cls, name: str) -> Any:
        """The default of a key."""
        return cls.model_fields[name].get_default(call_default_factory=True)

    @classmethod
    def check(cls: Type[SettingsType], section: Mapping[str, Any]) -> Tuple[SettingsType, List[str]]:
        """What a section says of these keys, and what is wrong with it; keys of others in it are passed over.

        Args:
            section: plain values, or OmegaConf's.

        Returns:
            The settings, with the default in place of what is wrong; the problems, each ``KEY: expected …, got …``.
        """
        given, problems = _plain(section, cls.model_fields)
        try:
            settings = cls(**given)
        except ValidationError as error:
            for fault in error.errors():
                name = str(fault["loc"][0])
                problems.setdefault(name, _problem(name, cls.model_fields[name], given[name]))
            settings = cls(**{name: value for name, value in given.items() if name not in problems})
        conflicts = [told for told in settings.conflicts() if told.partition(":")[0] not in problems]
        return settings, [*problems.values(), *conflicts]

    @classmethod
    def of(cls: Type[SettingsType], section: Mapping[str, Any]) -> SettingsType:
        """As `check`, for a section that has been checked.

        Raises:
            SettingsError: listing what is wrong.
        """
        settings, problems = cls.check(section)
        if problems:
            raise SettingsError(problems, section=cls.__name__)
        return settings

    @classmethod
    def check_all(cls: Type[SettingsType], section: Mapping[str, Any]) -> Tuple[SettingsType, List[str]]:
        """As `check`, for a section in which all keys are these: others are problems."""
        settings, problems = cls.check(section)
        return settings, [
            *(not_known(str(n), cls.model_fields) for n in section if n not in cls.model_fields),
            *problems,
        ]

    def conflicts(self) -> List[str]:
        """What is wrong beyond types and bounds, each ``KEY: …``; looks at no file."""
        of_tables = {name: declared.check_all(getattr(self, name) or {})[1] for name, declared in self.tables.items()}
        return [f"{name}.{told}" for name, found in of_tables.items() for told in found]


def not_known(name: str, known: Collection[str], what: str = "unknown key") -> str:
    """``NAME: unknown key``, with the known name that is nearest, or all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"{name}: {what}" + (f"; did you mean {close[0]}?" if close else f"; known: {', '.join(sorted(known))}")


def _plain(section: Any, names: Collection[str]) -> Tuple[Dict[str, Any], Dict[str, str]]:
    """The plain values of these keys, by name, and what is wrong with those whose ``${…}`` leads nowhere."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config: Any = section if OmegaConf.is_config(section) else OmegaConf.create(section)
    values: Dict[str, Any] = {}
    problems: Dict[str, str] = {}
    for name in (name for name in config if name in names):
        try:
            value = config[name]
            values[name] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except OmegaConfBaseException as error:
            path = str(error.full_key or name).split(".")
            place = ".".join(path[path.index(name) :]) if name in path else name
            why = str(error).splitlines()[0].rpartition("resolving interpolation: ")[2].strip('"')
            problems[name] = f"{place}: {why}"
    return values, problems


def _problem(name: str, field: FieldInfo, got: Any) -> str:
    expected = _expected(field)
    return f"{name}: expected {expected}{';' if ', ' in expected else ','} got {got!r}"


def _expected(field: FieldInfo) -> str:
    """What a field may be, in words."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and extra.get("expected"):
        return str(extra["expected"])
    return _in_words(field.annotation, field.metadata)


def _in_words(wanted: Any, bounds: Sequence[Any] = ()) -> str:
    """A type and its bounds (annotated_types' objects) in words."""
    if origin_of(wanted) is Union:
        return " or ".join(_in_words(option, bounds) for option in args_of(wanted) if option is not type(None))
    if origin_of(wanted) is Literal:
        choices = [str(choice) for choice in args_of(wanted)]
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    if origin_of(wanted) is list:
        return f"a list of {_in_words(*args_of(wanted)).replace('one of ', '')}"
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if wanted not in plain:
        return "a table"
    words = {"gt": "above {}", "ge": "from {}", "lt": "below {}", "le": "at most {}"}
    limits = [text.format(getattr(b, name)) for b in bounds for name, text in words.items() if hasattr(b, name)]
    return " ".join([plain[wanted], ", ".join(limits)]).strip()


def _allows(wanted: Any, kind: type) -> bool:
    return wanted is kind or (origin_of(wanted) is Union and any(_allows(option, kind) for option in args_of(wanted)))
