"""Where the files that a ``build_info`` names are."""

from pathlib import Path
from typing import Any, List, Sequence, Union

from lavis.common.utils import get_cache_path
from omegaconf import OmegaConf

from lavis_kvmod.system.paths import NO_HOME, expanded

__all__ = ["first_existing", "looked_for", "places", "stored", "strings"]


def places(storage: str) -> List[Path]:
    """Where a ``storage`` value is looked for: where the user stands, then in LAVIS's ``cache_root``. One that begins
    with ``~``, where there is no home folder, is nowhere."""
    try:
        here = expanded(str(storage))
    except FileNotFoundError:
        return [Path(str(storage))]
    return [here.absolute()] if here.is_absolute() else [here.absolute(), Path(get_cache_path(str(here)))]


def stored(storage: str) -> Path:
    """The first of a ``storage`` value's `places` where there is something, else the last."""
    return first_existing(places(storage))


def first_existing(candidates: Sequence[Path]) -> Path:
    """The first path where there is something, else the last."""
    return next((place for place in candidates if place.exists()), candidates[-1])


def looked_for(candidates: Sequence[Union[str, Path]], between: str = " nor ") -> str:
    """The `places`, for the message that there is nothing: "A nor B"."""
    homeless = any(str(place).startswith("~") for place in candidates)
    return between.join(map(str, candidates)) + (f" ({NO_HOME})" if homeless else "")


def strings(value: Any) -> List[str]:
    """One value, several or none, as a list of strings."""
    if value is None:
        return []
    if OmegaConf.is_list(value) or isinstance(value, (list, tuple)):
        return [str(entry) for entry in value]
    return [str(value)]
