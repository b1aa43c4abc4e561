"""Where the files that a ``build_info`` names are."""

from pathlib import Path
from typing import Any, List, Sequence

from lavis.common.utils import get_cache_path
from omegaconf import OmegaConf

__all__ = ["first_existing", "looked_for", "places", "stored", "strings"]


def places(storage: str) -> List[Path]:
    """Where a ``storage`` value is looked for: where the user stands, then in LAVIS's ``cache_root``."""
    here = Path(str(storage)).expanduser()
    return [here.absolute()] if here.is_absolute() else [here.absolute(), Path(get_cache_path(str(here)))]


def stored(storage: str) -> Path:
    """The first of a ``storage`` value's `places` where there is something, else the last."""
    return first_existing(places(storage))


def first_existing(candidates: Sequence[Path]) -> Path:
    """The first path where there is something, else the last."""
    return next((place for place in candidates if place.exists()), candidates[-1])


def looked_for(candidates: Sequence[Path]) -> str:
    """The `places`, for the message that there is nothing: "A nor B"."""
    return " nor ".join(map(str, candidates))


def strings(value: Any) -> List[str]:
    """One value, several or none, as a list of strings."""
    if value is None:
        return []
    if OmegaConf.is_list(value) or isinstance(value, (list, tuple)):
        return [str(entry) for entry in value]
    return [str(value)]
