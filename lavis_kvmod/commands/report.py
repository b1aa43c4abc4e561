"""``lavis-kvmod report``: a run on one page, or several beside each other; and the page that every run leaves."""

import argparse
import sys
from typing import Any, Dict, Optional

from lavis_kvmod.reports.run_files import read_run
from lavis_kvmod.reports.run_page import PAGE, leave_page, write_page
from lavis_kvmod.system.distributed import get_rank
from lavis_kvmod.system.paths import absolute


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="of a run, with its log.txt; several are compared")
    parser.add_argument(
        "--out", metavar="HTML", help=f"default: {PAGE} in the run's folder; of several, where you stand"
    )


def main(args: argparse.Namespace) -> int:
    """Write the page; returns the exit status: 2 for what the user can mend."""
    try:
        folders = [absolute(folder) for folder in args.folders]
        runs = [read_run(folder) for folder in folders]
        default = folders[0] / PAGE if len(folders) == 1 else absolute(PAGE)
        print(write_page(runs, absolute(args.out) if args.out else default))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def train_and_report(runner: Any) -> Optional[Dict[str, Any]]:
    """Train, and leave the report; returns the test splits' metrics (rank 0)."""
    logs = runner.train()
    if get_rank() == 0:
        leave_report(runner)
    return logs


def leave_report(runner: Any) -> None:
    """Write ``report.html`` into the folder of a run that is over. LAVIS's own runners have other folders: nothing."""
    if not hasattr(runner, "log_parts"):
        return
    model = runner.unwrap_dist_model(runner.model)
    parts = model.parts() if hasattr(model, "parts") else []
    path = leave_page(runner.output_dir, parts, getattr(runner.task, "evaluated", None) or {}, runner.datasets)
    if path is not None:
        print(f"Report: {path}")
