"""``lavis-kvmod demo``: the whole path on real handwriting, with and without KV modulation, compared.

Two trainings by `projects/kvmod/demo_vqa.yaml` that differ in one word, side by side where the machine allows. The
image encoder knows shape and is blind to colour, so the colour questions show what the prefix brings.
"""

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

from lavis_kvmod.commands.launch import build_runner, load_config, set_up_logging
from lavis_kvmod.commands.report import train_and_report
from lavis_kvmod.demo import digits, parts
from lavis_kvmod.doctor.machine import look
from lavis_kvmod.reports.run_files import read_run
from lavis_kvmod.reports.run_page import PAGE, write_page
from lavis_kvmod.runners.run_folder import BEST
from lavis_kvmod.system.allocator import keep_freed_memory
from lavis_kvmod.system.paths import absolute
from lavis_kvmod.system.progress import resident_peak_gib, sharing_terminal
from lavis_kvmod.system.second_process import SecondProcess, SecondProcessError

RUN_FILE = "projects/kvmod/demo_vqa.yaml"
# With a greater rate for the prefix 5 epochs are as good as the run file's 6.
QUICK = ("run.max_epoch=5", "run.kv_lr_scale=3", "run.valid_splits=[]")
KINDS = (*digits.QUESTIONS, "overall")
CHANCE = {"digit": 1 / 10, "ink": 1 / len(digits.INKS), "paper": 1 / len(digits.PAPERS), "even": 1 / 2}
SHOWN = 12  # scans on the contact sheet: the first of the test split, whatever was answered
ARMS = {"with_prefix": True, "without_prefix": False}  # name -> model.kv_modulation
FREE_FOR_TWO = 4 * 2**30  # bytes: a training takes 1.5 GiB


class Trained(NamedTuple):
    """What is told of an arm: its run's folder, its accuracy by question, its answers, seconds, and peak of memory."""

    folder: Path
    accuracy: Dict[str, float]
    predictions: List[Dict[str, Any]]
    parts_seconds: float
    training_seconds: float
    peak_gib: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--output-dir", default="output/demo", help="where results go (default: %(default)s)")
    parser.add_argument(
        "--options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help=f"override values of {RUN_FILE} in both trainings, e.g. run.max_epoch=2",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        choices=(1, 2),
        help="trainings at once (default: 2, where there are two cores and 4 GiB of free memory)",
    )


def main(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit status: 1 if one of the trainings failed."""
    set_up_logging()
    output = absolute(args.output_dir).resolve()
    machine = look()
    jobs = args.jobs or trainings_at_once(machine.cores, machine.memory_free)
    start = time.monotonic()
    try:
        trained = train_both(output, args.options, jobs, machine.cores)
    except SecondProcessError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    tell(trained, output, time.monotonic() - start, jobs)
    return 0


def trainings_at_once(cores: int, memory_free: Optional[int]) -> int:
    """2 where each training has a core, and there is memory for two; a small model gains little by a second core."""
    return 2 if cores >= 2 and (memory_free is None or memory_free >= FREE_FOR_TWO) else 1


def train_both(output: Path, options: Sequence[str], jobs: int, cores: int) -> Dict[str, Trained]:
    """Both arms, by name: one after the other, or side by side, the second one in a process of its own.

    Raises:
        SecondProcessError: if the second one failed there; the first one is trained to its end.
    """
    if jobs == 1:
        return {name: train_arm(name, output, options) for name in ARMS}
    first, second = ARMS
    threads = max(1, cores // jobs)
    with SecondProcess(second, train_arm, second, output, options, threads) as other:
        mine = train_arm(first, output, options, threads)
        return {first: mine, second: other.result()}


def train_arm(name: str, output: Path, options: Sequence[str], threads: Optional[int] = None) -> Trained:
    """Build the frozen parts that are not there, and train with or without the prefix.

    With a number of ``threads`` this is one of two processes: each builds one of the parts, and waits for the other's.
    """
    if threads is None:
        logging.info("===== %s =====", _spoken(name))
        return _train_arm(name, output, options, language_first=False)
    torch.set_num_threads(threads)
    with sharing_terminal(_spoken(name)):
        set_up_logging()
        return _train_arm(name, output, options, language_first=name != next(iter(ARMS)))


def _train_arm(name: str, output: Path, options: Sequence[str], language_first: bool) -> Trained:
    start = time.monotonic()
    keep_freed_memory()
    parts.build_parts(language_first=language_first)
    built = time.monotonic()
    of_arm = [f"run.output_dir={output / name}", f"model.kv_modulation={str(ARMS[name]).lower()}"]
    runner = build_runner(load_config(RUN_FILE, [*QUICK, *of_arm, *options]))
    metrics = (train_and_report(runner) or {})["test"]
    return Trained(
        folder=runner.output_dir,
        accuracy={kind: round(metrics[_metric(kind)] / 100, 4) for kind in KINDS},
        predictions=json.loads((runner.result_dir / "test_epochbest.json").read_text(encoding="utf-8")),
        parts_seconds=built - start,
        training_seconds=time.monotonic() - built,
        peak_gib=resident_peak_gib(),
    )


def tell(trained: Dict[str, Trained], output: Path, seconds: float, jobs: int) -> None:
    """Write ``summary.json``, the picture and the page, and print what was found."""
    peaks = [arm.peak_gib for arm in trained.values()]
    summary: Dict[str, Any] = {name: arm.accuracy for name, arm in trained.items()}
    summary["seconds"] = {
        "frozen_parts": round(max(arm.parts_seconds for arm in trained.values()), 1),
        **{name: round(arm.training_seconds, 1) for name, arm in trained.items()},
        "all": round(seconds, 1),
    }
    summary["trainings_at_once"] = jobs
    summary["peak_memory_gib"] = round(sum(peaks) if jobs > 1 else max(peaks), 2)
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    sheet = output / "answers.png"
    with_prefix, without_prefix = trained["with_prefix"], trained["without_prefix"]
    contact_sheet(with_prefix.predictions, without_prefix.predictions).save(sheet)
    report = write_page([read_run(arm.folder) for arm in trained.values()], output / PAGE)

    print(f"\nHeld-out accuracy on {digits.SPLITS['test']} scans\n")
    print(accuracy_table(summary))
    print("\nSome answers, with the prefix\n")
    print(answer_lines(with_prefix.predictions, scans=3))
    print(f"\nPicture: {sheet}\nReport: {report}\nNumbers: {output / 'summary.json'}")
    print(f"\nThe model, in Python:\n\n{loading_lines(with_prefix.folder / BEST)}")


def loading_lines(checkpoint: Path) -> str:
    """Python that loads the demo's model with the weights of a run."""
    return (
        "from lavis.models import load_model\n"
        f'model = load_model("blip2_opt_kvmod", "demo", is_eval=True, checkpoint={str(checkpoint)!r})'
    )


def _spoken(name: str) -> str:
    return name.replace("_", " ")


def _metric(kind: str) -> str:
    """What the task calls the accuracy on a kind of question."""
    return kind if kind == "overall" else f"question_type/{kind}"


def accuracy_table(summary: Dict[str, Any]) -> str:
    """Accuracy by question type, with and without prefix, beside chance."""
    lines = [f"  {'question':<10}{'chance':>8}{'without prefix':>17}{'with prefix':>14}"]
    for kind in KINDS:
        chance = f"{CHANCE[kind]:.2f}" if kind in CHANCE else ""
        without, with_prefix = summary["without_prefix"][kind], summary["with_prefix"][kind]
        lines.append(f"  {kind:<10}{chance:>8}{without:>17.3f}{with_prefix:>14.3f}")
    return "\n".join(lines)


def answer_lines(predictions: Sequence[Dict[str, Any]], scans: int) -> str:
    """Questions, answers and whether they are right, for the first test scans."""
    answered = _by_scan(predictions)
    lines = []
    for scan in digits.load_scans("test")[:scans]:
        lines.append(f"  {digits.caption(scan)}")
        for question in digits.questions(scan):
            answer = answered[scan.index][question.type]
            mark = "right" if answer == question.answer else f"wrong, it is {question.answer}"
            lines.append(f"    {question.question:<26} {answer:<8} {mark}")
    return "\n".join(lines)


def contact_sheet(
    with_prefix: Sequence[Dict[str, Any]], without_prefix: Sequence[Dict[str, Any]], columns: int = 3
) -> Image.Image:
    """The first test scans, with what each of the two models answers; wrong answers in red."""
    answered = [_by_scan(with_prefix), _by_scan(without_prefix)]
    scans = digits.load_scans("test")[:SHOWN]
    width, picture, line, at = 410, 130, 18, (200, 300)
    height = picture + line * (2 + len(digits.QUESTIONS)) + 28
    sheet = Image.new("RGB", (columns * width, -(-len(scans) // columns) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for i, scan in enumerate(scans):
        x, y = (i % columns) * width + 12, (i // columns) * height + 12
        sheet.paste(digits.render(scan).resize((picture, picture), Image.Resampling.NEAREST), (x, y))
        y += picture + 4
        draw.text((x, y), digits.caption(scan), fill="black", font=font)
        for column, name in zip(at, ("with prefix", "without")):
            draw.text((x + column, y), name, fill="grey", font=font)
        for n, question in enumerate(digits.questions(scan), start=1):
            draw.text((x, y + n * line), question.question, fill="black", font=font)
            for column, of_model in zip(at, answered):
                answer = of_model[scan.index][question.type]
                colour = "black" if answer == question.answer else "firebrick"
                draw.text((x + column, y + n * line), answer, fill=colour, font=font)
    return sheet


def _by_scan(predictions: Sequence[Dict[str, Any]]) -> Dict[int, Dict[str, str]]:
    """scan index -> question type -> answer, from question ids such as "0012-ink"."""
    answered: Dict[int, Dict[str, str]] = {}
    for row in predictions:
        index, kind = row["question_id"].split("-")
        answered.setdefault(int(index), {})[kind] = row["answer"]
    return answered
