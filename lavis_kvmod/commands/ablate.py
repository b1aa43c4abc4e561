"""``lavis-kvmod ablate``: train every arm of a study with several seeds, and say what the differences are worth."""

import argparse
import contextlib
import json
import logging
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any, Dict

import torch

from lavis_kvmod.commands.launch import TOLD, build_runner, load_config, set_up_logging
from lavis_kvmod.reports.study import study_html, study_markdown
from lavis_kvmod.runners.environment import environment
from lavis_kvmod.studies.results import summarise
from lavis_kvmod.studies.running import StudyError, Tools, run_members
from lavis_kvmod.studies.study import Study, load_study
from lavis_kvmod.system.paths import absolute
from lavis_kvmod.weights.files import whole_or_nothing

RESULTS, MARKDOWN, PAGE = "results.json", "report.md", "report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--cfg-path", required=True, metavar="RUN.yaml", help="the run file that all arms start from")
    parser.add_argument("--study", required=True, metavar="STUDY.yaml", help="arms, seeds and what is compared")
    parser.add_argument("--output-dir", help="where trainings and results go (default: output/STUDY)")
    parser.add_argument("--jobs", type=int, help="trainings at once (default: one a CPU core; on a GPU one)")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="also put the report into its place in this page")
    parser.add_argument("--keep-checkpoints", action="store_true", help="keep the trained weights of every training")
    parser.add_argument(
        "--options", nargs="+", default=[], metavar="KEY=VALUE", help="override values of the run file in all arms"
    )


def main(args: argparse.Namespace) -> int:
    """Run a study; returns the exit status. Starting it again goes on where it was stopped."""
    set_up_logging()
    with contextlib.suppress(ValueError):  # only a main thread may
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that workers are told
    try:
        study, configs = load_study(args.study, args.cfg_path, load_config, args.options)
        output = absolute(args.output_dir or f"output/{study.name}")
        results = run_study(study, configs, output, args.jobs, args.keep_checkpoints)
    except TOLD as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StudyError as error:
        print(f"error: {error}. Start again to go on; what is trained is kept", file=sys.stderr)
        return 1
    if args.write is not None:
        args.write.write_text(filled(args.write.read_text(encoding="utf-8"), results), encoding="utf-8")
    print(study_markdown(results))
    print(f"Report: {output / PAGE}\nNumbers: {output / RESULTS}")
    return 0


def filled(page: str, results: Dict[str, Any]) -> str:
    """A page with a study's report between ``<!-- study: NAME -->`` and ``<!-- end -->``, written anew.

    Raises:
        ValueError: if the page has no place for it.
    """
    place = re.compile(rf"(<!-- study: {re.escape(results['study'])} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not place.search(page):
        raise ValueError(f"expected <!-- study: {results['study']} --> and <!-- end --> in the page, found none")
    report = re.sub("^#", "##", study_markdown(results), flags=re.MULTILINE)
    return place.sub(lambda found: f"{found[1]}\n{report}\n{found[2]}", page)


def run_study(
    study: Study, configs: Dict[str, Any], output: Path, jobs: Any = None, keep: bool = False
) -> Dict[str, Any]:
    """Train what is not trained yet, and write ``results.json``, ``report.md`` and ``report.html`` to ``output``."""
    members = study.members(output, configs)
    device = next(iter(configs.values()))["run"].get("device", "cuda")
    jobs = jobs or (os.cpu_count() or 1 if device == "cpu" else 1)
    logging.info("%s: %d arms with %d seeds", study.name, len(study.arms), len(study.settings.seeds))
    results = run_members(members, Tools(load_config, build_runner), output, jobs, keep)
    set_up_logging()
    about = environment(torch.device(device), 1)
    summary = {**summarise(study, results), "device": about["device"], "versions": about["versions"]}
    for name, text in (
        (RESULTS, json.dumps(summary, indent=1, ensure_ascii=False) + "\n"),
        (MARKDOWN, study_markdown(summary)),
        (PAGE, study_html(summary)),
    ):
        with whole_or_nothing(output / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return summary
