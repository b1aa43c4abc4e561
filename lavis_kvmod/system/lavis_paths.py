"""LAVIS's registry, and the paths it keeps there: where results go, and under which folder data is looked for."""

from typing import Any, Dict, Optional

from lavis_kvmod.system.paths import absolute

# The cache root that the latest run file has named, and the one it took the place of.
_run_file_cache: Dict[str, Optional[str]] = {}


def lavis_registry() -> Any:
    """LAVIS's registry; LAVIS, which takes seconds to import, is imported only now."""
    from lavis.common.registry import registry

    return registry


def set_registry_path(name: str, value: object) -> None:
    """Set a path in LAVIS's registry, whether or not it is set already.

    LAVIS's own ``register_path`` refuses a second value, so that two runs in one process could not
    write to different folders.
    """
    lavis_registry().mapping["paths"][name] = str(value)


def use_cache_root(named_by_run_file: Optional[str] = None) -> None:
    """Choose the folder under which LAVIS looks for data, and to which it downloads.

    A run file's ``env.cache_root`` (relative to where the user stands) holds for that run alone: with None, what was
    in force before comes back, which is ``LAVIS_CACHE_ROOT`` as it stood when LAVIS was imported, or LAVIS's own
    default (``configs/default.yaml``: a folder under ``/export/home``).
    """
    if _run_file_cache and lavis_registry().get_path("cache_root") == _run_file_cache["root"]:
        set_registry_path("cache_root", _run_file_cache["before"])
    _run_file_cache.clear()
    if named_by_run_file is not None:
        root = str(absolute(named_by_run_file))
        _run_file_cache.update(root=root, before=lavis_registry().get_path("cache_root"))
        set_registry_path("cache_root", root)
