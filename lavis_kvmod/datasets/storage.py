"""Where the files that a ``build_info`` names are."""

from pathlib import Path
from typing import Any, List

from lavis.common.utils import get_cache_path
from omegaconf import OmegaConf

__all__ = ["looked_for", "stored", "strings"]


def stored(storage: str) -> Path:
    """The path of a ``storage`` value: relative to where the user stands if it exists there, else to LAVIS's
    ``cache_root``. It need not exist."""
    here = Path(str(storage)).expanduser()
    if here.is_absolute() or here.exists():
        return here.absolute()
    return Path(get_cache_path(str(here)))


def looked_for(storage: str) -> str:
    """All places where `stored` looks, for the message that there is nothing: "A nor B"."""
    here = Path(str(storage)).expanduser()
    places = [here.absolute()] if here.is_absolute() else [here.absolute(), Path(get_cache_path(str(here)))]
    return " nor ".join(map(str, places))


def strings(value: Any) -> List[str]:
    """One value, several or none, as a list of strings."""
    if value is None:
        return []
    if OmegaConf.is_list(value) or isinstance(value, (list, tuple)):
        return [str(entry) for entry in value]
    return [str(value)]
