"""Where files are: what the package ships, what a user names, and what is cached."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import List, Union

_PACKAGE = Path(__file__).resolve().parents[1]
CACHE = "LAVIS_KVMOD_CACHE"

# What is told where a path begins with ~, or a cache would.
NO_HOME = "no home folder is known (HOME is not set, and this user id has no name): set HOME to a folder of yours"


def resource(relative: str) -> Path:
    """The absolute path of a shipped file, such as ``configs/models/blip2_opt_kvmod/demo.yaml``.

    In an installed wheel these files are inside the package; in a checkout and an editable
    install they stand beside it.

    Raises:
        FileNotFoundError: nothing is shipped under that name.
    """
    for root in _roots():
        if (root / relative).exists():
            return root / relative
    looked = ", ".join(str(root / relative) for root in _roots())
    raise FileNotFoundError(
        f"expected {relative!r} among the files of lavis-kvmod, looked for it at {looked}; "
        "check the spelling, or reinstall lavis-kvmod"
    )


def resolve_config(path: str) -> Path:
    """The run file that ``--cfg-path`` names.

    A path that exists from where the user stands is taken as given. Else one that starts with
    ``projects/`` is looked up in this package, then in LAVIS, as is ``lavis/projects/``.

    Raises:
        FileNotFoundError: there is no such file; the message lists those that are shipped.
    """
    given = expanded(path)
    if given.is_file():
        return given
    inside = given.parts[1:] if given.parts[:1] == ("lavis",) else given.parts
    if inside[:1] == ("projects",):
        for root in (*_roots(), *_lavis_roots()):
            if root.joinpath(*inside).is_file():
                return root.joinpath(*inside)
    raise FileNotFoundError(
        f"expected a YAML file, got {path!r}, which is neither in {Path.cwd()} nor shipped; "
        f"shipped are {', '.join(run_files()) or 'none'}"
    )


def absolute(path: Union[str, Path]) -> Path:
    """A path as its user means it: ``~`` is their home, and what is relative starts where they stand.

    Raises:
        FileNotFoundError: for ``~`` where there is no home folder.
    """
    return expanded(path).absolute()


def has_home() -> bool:
    """Whether ``~`` stands for a folder; in a container under an arbitrary user id it may not."""
    return os.path.expanduser("~") != "~"


def cannot_be_written(path: Union[str, Path]) -> List[str]:
    """Why a folder cannot be made or written to, as a list of one problem or none."""
    try:
        folder = absolute(path)
    except FileNotFoundError as error:
        return [str(error)]
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        return [f"{there} is a file; name a folder"]
    if not os.access(there, os.W_OK | os.X_OK):
        return [f"{there} cannot be written to; name a folder of yours"]
    return []


def expanded(path: Union[str, Path]) -> Path:
    """A path with the home folder in place of ``~``.

    Raises:
        FileNotFoundError: where there is no such folder.
    """
    if str(path).startswith("~") and not has_home():  # or a folder called ~ would be made
        raise FileNotFoundError(f"{path}: {NO_HOME}")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # ~somebody
        raise FileNotFoundError(f"{path}: no user of that name has a home folder here") from error


def cache_dir() -> Path:
    """The folder for what is built once: ``LAVIS_KVMOD_CACHE``, or ``~/.cache/lavis_kvmod``.

    It need not exist yet.

    Raises:
        FileNotFoundError: naming the variables to set, where there is no home folder.
    """
    if not os.environ.get(CACHE) and not has_home():
        raise FileNotFoundError(f"{NO_HOME}, or {CACHE} to one for what is built once")
    return absolute(os.environ.get(CACHE) or "~/.cache/lavis_kvmod")


def _roots() -> List[Path]:
    """The folders which may hold ``configs/`` and ``projects/``."""
    checkout = _PACKAGE.parent
    # Beside an installed package is site-packages, where LAVIS's wheel leaves a `projects` too.
    return [_PACKAGE, checkout] if (checkout / "setup.py").is_file() else [_PACKAGE]


def _lavis_roots() -> List[Path]:
    spec = find_spec("lavis")  # found, not imported: that takes seconds
    return [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]


def run_files() -> List[str]:
    """The run files that are shipped, as ``--cfg-path`` takes them."""
    return sorted(
        {file.relative_to(root).as_posix() for root in _roots() for file in (root / "projects").rglob("*.yaml")}
    )
