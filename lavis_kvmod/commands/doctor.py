"""``lavis-kvmod doctor``: one screen on what is installed, what is missing, and whether a run fits this machine."""

import argparse
import contextlib
import io
import logging
import subprocess
import sys
import warnings
from typing import Callable, List, Optional, Sequence, Tuple

from lavis_kvmod import __version__, disabled
from lavis_kvmod.doctor import machine, versions
from lavis_kvmod.doctor.findings import WRONG, Finding, Section, render, stops

MODEL = "blip2_opt_kvmod"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--cfg-path", metavar="YAML", help="also look at this run file: data, weights, disk, memory")
    parser.add_argument(
        "--options", nargs="+", default=[], metavar="KEY=VALUE", help="overrides, as for python -m lavis.train"
    )


def main(args: argparse.Namespace) -> int:
    """Print what was found; returns 1 if something keeps the run (or any run) from starting, else 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sections = examine(args.cfg_path, args.options)
    print(render(sections))
    found = stops(sections)
    what = args.cfg_path or "this installation"
    if not found:
        print(f"\nNothing was found that keeps {what} from running.")
        return 0
    things = "1 thing keeps" if len(found) == 1 else f"{len(found)} things keep"
    print(f"\n{things} {what} from running: see the lines marked missing or wrong.")
    return 1


def examine(cfg_path: Optional[str] = None, options: Sequence[str] = ()) -> List[Section]:
    """Look at everything; what fails while it is looked at is a finding too."""
    sections = [Section(f"lavis-kvmod {__version__}", _guarded(_installation))]
    lavis_works = "lavis" in sys.modules and not stops(sections)
    here = machine.Machine()
    try:
        here = machine.look()
        sections.append(Section("Machine", machine.device_findings(here)))
    except Exception as error:
        sections.append(Section("Machine", [versions.import_finding("torch", error)]))
    if cfg_path and lavis_works and not disabled():
        # Before the places: the run file may say where data lies.
        from_run_file = Section(f"Run file {cfg_path}", _guarded(lambda: _run_file(cfg_path, options, here)))
    elif cfg_path:
        first = "mend the above first" if not disabled() else "unset LAVIS_KVMOD_DISABLE"
        from_run_file = Section(
            f"Run file {cfg_path}", [Finding(WRONG, "cannot be looked at without the plugin", first)]
        )
    sections.append(Section("Places", _guarded(machine.places)))
    sections.append(Section("Optional", _guarded(lambda: machine.optional_findings(machine.present()))))
    return [*sections, from_run_file] if cfg_path else sections


def _installation() -> List[Finding]:
    found = versions.version_findings(versions.installed_versions())
    error, output, warned = _import_lavis()
    if error is not None:
        return [*found, versions.import_finding("lavis", error, output)]
    plugin = versions.plugin_finding(
        disabled=disabled(), hooked=_hooked(), active=_is_active(), warning=" ".join(warned)
    )
    return [*found, plugin]


def _import_lavis() -> Tuple[Optional[BaseException], str, List[str]]:
    """Import LAVIS quietly: the error or None, what it wrote, and what the hook warned of."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    output = io.StringIO()
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                import lavis.models  # noqa: F401
            except (Exception, SystemExit) as error:
                return error, output.getvalue(), []
    return None, output.getvalue(), [str(w.message) for w in caught if "lavis-kvmod" in str(w.message)]


def _is_active() -> bool:
    from lavis.common.registry import registry

    return registry.get_model_class(MODEL) is not None


def _hooked() -> bool:
    """Whether this Python runs our hook when it starts."""
    command = [sys.executable, "-c", "import sys; sys.exit('lavis_kvmod._hook' not in sys.modules)"]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0


def _run_file(cfg_path: str, options: Sequence[str], here: machine.Machine) -> List[Finding]:
    from lavis_kvmod.doctor.run_file import run_file_findings

    return run_file_findings(cfg_path, options, here)


def _guarded(look: Callable[[], List[Finding]]) -> List[Finding]:
    try:
        return look()
    except Exception as error:
        logging.debug("doctor", exc_info=True)
        return [Finding(WRONG, f"could not be looked at: {type(error).__name__}: {error}", "please report it")]
