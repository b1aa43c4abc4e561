"""Versions against those that are tested, and what to do about an import that fails: decisions, apart from the machine.

Versions are read from the packages' metadata, which needs no import.
"""

import platform
import re
from importlib import metadata
from typing import Dict, List, Mapping, NamedTuple, Optional, Tuple

from lavis_kvmod.doctor.findings import MISSING, NOTE, OK, WARN, WRONG, Finding

Numbers = Tuple[int, ...]

# constraints.txt, which is not installed, and LAVIS.
TESTED = {
    "salesforce-lavis": "1.0.2",
    "torch": "2.14.1",
    "torchvision": "0.29.1",
    "transformers": "4.26.1",
    "numpy": "1.26.4",
}


class Bounds(NamedTuple):
    """Versions that work: ``at_least`` and ``below``; why, and the command that gets one."""

    at_least: Numbers
    below: Optional[Numbers]
    why: str
    command: str


# What setup.py and LAVIS ask for, where an environment is known to stray.
BOUNDS = {
    "salesforce-lavis": Bounds((1, 0, 2), (1, 0, 3), "the release this package extends", "salesforce-lavis==1.0.2"),
    "torch": Bounds((2, 4), None, "this package needs it", '"torch>=2.4" torchvision'),
    "torchvision": Bounds((0, 19), None, "it goes with torch 2.4", '"torch>=2.4" torchvision'),
    "transformers": Bounds((4, 25), (4, 27), "LAVIS's language models are written for it", "transformers==4.26.1"),
    "numpy": Bounds((1,), (2,), "LAVIS's opencv-python-headless 4.5.5.64 was built for NumPy 1", '"numpy<2"'),
    "timm": Bounds((0, 4, 12), (0, 4, 13), "LAVIS's ViT is written for it", "timm==0.4.12"),
}
PYTHON = ((3, 8), (3, 12))

# An import error's words, and what to do.
_IMPORT_REMEDIES = (
    (r"numpy\.core\.multiarray failed to import|_ARRAY_API not found|NumPy 1\.x", 'pip install "numpy<2"'),
    (r"torchvision::nms|torchvision.*(version|compiled)", "pip install --force-reinstall torch torchvision"),
    (r"libGL\.so", "pip uninstall opencv-python; pip install --force-reinstall opencv-python-headless==4.5.5.64"),
    (r"from 'transformers|transformers\.modeling_utils", "pip install transformers==4.26.1"),
    (r"from 'timm|No module named 'timm", "pip install timm==0.4.12"),
    (r"No module named 'pkg_resources'", 'pip install "setuptools<81"'),
)


def numbers(version: str) -> Numbers:
    """The leading numbers of a version: "2.14.1+cu130" -> (2, 14, 1)."""
    return tuple(int(part) for part in re.findall(r"^[\d.]*", version)[0].split(".") if part)


def installed_versions() -> Dict[str, Optional[str]]:
    """The version of each package that is looked at, None where it is not installed."""
    found: Dict[str, Optional[str]] = {}
    for name in BOUNDS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def version_findings(installed: Mapping[str, Optional[str]], python: str = "") -> List[Finding]:
    """What is to be said of these versions: one line for all that are as tested, one for each other."""
    python = python or platform.python_version()
    found, tested = [], []
    if PYTHON[0] <= numbers(python)[:2] < PYTHON[1]:
        tested.append(f"Python {python}")
    else:
        why = "transformers below 4.27, which LAVIS needs, has no tokenizers for other versions"
        found.append(Finding(WRONG, f"Python {python}: {why}", "make an environment with Python 3.8 to 3.11"))
    for name, version in installed.items():
        bounds, usual = BOUNDS[name], TESTED.get(name)
        step = f"pip install {bounds.command}"
        if version is None:
            found.append(Finding(MISSING, f"{name} is not installed", step))
        elif not _within(version, bounds):
            found.append(Finding(WRONG, f"{name} {version}: expected {_range(bounds)}, {bounds.why}", step))
        elif usual is None or numbers(version) == numbers(usual):
            tested.append(f"{name} {version}")
        else:
            found.append(Finding(NOTE, f"{name} {version} (tested with {usual})"))
    return [Finding(OK, f"{', '.join(tested)}: as tested"), *found] if tested else found


def _within(version: str, bounds: Bounds) -> bool:
    got = numbers(version)
    return got >= bounds.at_least and (bounds.below is None or got < bounds.below)


def _range(bounds: Bounds) -> str:
    at_least = ".".join(map(str, bounds.at_least))
    return (
        f"{at_least} or newer" if bounds.below is None else f"{at_least} up to below {'.'.join(map(str, bounds.below))}"
    )


def import_finding(name: str, error: BaseException, output: str = "") -> Finding:
    """An import of ``name`` that failed with ``error``, having written ``output``."""
    said = f"{type(error).__name__}: {error}"
    step = "the lines above may name the package; else reinstall: pip install --force-reinstall lavis-kvmod"
    for words, remedy in _IMPORT_REMEDIES:
        if re.search(words, f"{said}\n{output}"):
            step = remedy
            break
    else:
        module = re.search(r"No module named '([\w.]+)'", said)
        if module:
            step = f"pip install {module[1].split('.')[0]}"
    return Finding(WRONG, f"import {name} fails: {_one_line(said)}", step)


def plugin_finding(*, disabled: bool, hooked: bool, active: bool, warning: str = "") -> Finding:
    """Whether LAVIS knows this package.

    Args:
        disabled: ``LAVIS_KVMOD_DISABLE`` is set.
        hooked: Python runs ``lavis_kvmod.pth`` when it starts.
        active: LAVIS's registry knows our model.
        warning: what the hook said when it failed.
    """
    if disabled:
        return Finding(WARN, "the plugin is turned off by LAVIS_KVMOD_DISABLE", "unset LAVIS_KVMOD_DISABLE")
    if not hooked:
        text = "this Python does not run lavis_kvmod.pth when it starts, so LAVIS does not load the plugin by itself"
        return Finding(WRONG, text, "install the package with this Python: pip install .")
    if not active:
        return Finding(WRONG, f"LAVIS does not know the plugin: {warning or 'it was not activated'}", "pip install .")
    return Finding(OK, "LAVIS knows blip2_opt_kvmod (hook lavis_kvmod.pth)")


def _one_line(text: str, longest: int = 200) -> str:
    words = " ".join(text.split())
    return words if len(words) <= longest else f"{words[: longest - 1]}…"
