"""``lavis-kvmod demo``: the whole path on real handwriting, with and without KV modulation, compared.

Two trainings by `projects/kvmod/demo_vqa.yaml` that differ in one word. The image encoder knows shape and is blind to
colour, so the colour questions show what the prefix brings.
"""

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any, Dict, List, Sequence

from PIL import Image, ImageDraw, ImageFont

from lavis_kvmod.commands.launch import build_runner, load_config, set_up_logging
from lavis_kvmod.commands.report import train_and_report
from lavis_kvmod.demo import digits, parts
from lavis_kvmod.reports.run_files import read_run
from lavis_kvmod.reports.run_page import PAGE, write_page
from lavis_kvmod.runners.run_folder import BEST
from lavis_kvmod.system.paths import absolute
from lavis_kvmod.system.progress import resident_peak_gib

RUN_FILE = "projects/kvmod/demo_vqa.yaml"
KINDS = (*digits.QUESTIONS, "overall")
CHANCE = {"digit": 1 / 10, "ink": 1 / len(digits.INKS), "paper": 1 / len(digits.PAPERS), "even": 1 / 2}
SHOWN = 12  # scans on the contact sheet: the first of the test split, whatever was answered


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


def main(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit status."""
    set_up_logging()
    output = absolute(args.output_dir).resolve()
    start = time.monotonic()
    parts.build_parts()
    seconds = {"frozen_parts": time.monotonic() - start}

    summary: Dict[str, Any] = {}
    predictions: Dict[str, List[Dict[str, Any]]] = {}
    folders: Dict[str, Path] = {}
    for name, modulated in (("with_prefix", True), ("without_prefix", False)):
        logging.info("===== %s =====", name.replace("_", " "))
        start = time.monotonic()
        options = [f"run.output_dir={output / name}", f"model.kv_modulation={str(modulated).lower()}"]
        runner = build_runner(load_config(RUN_FILE, [*options, *args.options]))
        metrics = (train_and_report(runner) or {})["test"]
        seconds[name] = time.monotonic() - start
        folders[name] = runner.output_dir
        summary[name] = {kind: round(metrics[_metric(kind)] / 100, 4) for kind in KINDS}
        predictions[name] = json.loads((runner.result_dir / "test_epochbest.json").read_text(encoding="utf-8"))

    summary["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    summary["peak_memory_gib"] = round(resident_peak_gib(), 2)
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    sheet = output / "answers.png"
    contact_sheet(predictions["with_prefix"], predictions["without_prefix"]).save(sheet)
    report = write_page([read_run(folder) for folder in folders.values()], output / PAGE)

    print(f"\nHeld-out accuracy on {digits.SPLITS['test']} scans\n")
    print(accuracy_table(summary))
    print("\nSome answers, with the prefix\n")
    print(answer_lines(predictions["with_prefix"], scans=3))
    print(f"\nPicture: {sheet}\nReport: {report}\nNumbers: {output / 'summary.json'}")
    print(f"\nThe model, in Python:\n\n{loading_lines(folders['with_prefix'] / BEST)}")
    return 0


def loading_lines(checkpoint: Path) -> str:
    """Python that loads the demo's model with the weights of a run."""
    return (
        "from lavis.models import load_model\n"
        f'model = load_model("blip2_opt_kvmod", "demo", is_eval=True, checkpoint={str(checkpoint)!r})'
    )


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
