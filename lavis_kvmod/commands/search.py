"""``lavis-kvmod search``: images for a text, among features that ``lavis-kvmod embed`` wrote."""

import argparse
import logging
import sys
from typing import List, NamedTuple, Optional, Sequence

from lavis_kvmod.commands.embed import load, picture_of
from lavis_kvmod.commands.launch import TOLD, set_up_logging, weights_named
from lavis_kvmod.system.paths import expanded


class Found(NamedTuple):
    """An image: its name, its number in the split, and how well it fits."""

    name: str
    number: int
    score: float


def search(
    features_file: str,
    texts: Sequence[str],
    cfg_path: str,
    *,
    options: Sequence[str] = (),
    top: int = 10,
    sheet: Optional[str] = None,
) -> List[List[Found]]:
    """The images that fit each text best, the best first.

    Args:
        features_file: of ``lavis-kvmod embed``.
        texts: what to look for.
        cfg_path, options: the run file that the features were made with: its model reads the texts.
        sheet: a PNG or HTML file for the pictures that were found.

    Raises:
        ConfigurationError, CheckpointError, FileNotFoundError, ValueError: if something cannot be had, or does not fit.
    """
    from lavis_kvmod.reports.contact_sheet import SheetRow, Shown, require_kind, write_sheet
    from lavis_kvmod.tasks import embedding

    sheet_file = expanded(sheet) if sheet else None
    if sheet_file is not None:
        require_kind(sheet_file)  # before the model, which takes longer
    features = embedding.read_features(expanded(features_file))
    loaded = load(cfg_path, options, features.about["split"])
    dataset, used = loaded.datasets[features.about["split"]], weights_named(loaded.cfg)
    if used != features.about["checkpoint"]:
        logging.warning("the features are of %s, and the texts are read by %s", features.about["checkpoint"], used)
    with loaded.autocast():
        wanted = embedding.embed_texts(loaded.model, [dataset.text_processor(text) for text in texts])
    best = embedding.search(features, wanted, top)
    found = [
        [Found(features.images[number], number, score) for number, score in zip(numbers, scores)]
        for numbers, scores in zip(best.numbers.tolist(), best.scores.tolist())
    ]
    if sheet_file is not None:
        rows = [
            SheetRow(text, [Shown(picture_of(dataset, one.number), f"{one.score:.3f} {one.name}") for one in images])
            for text, images in zip(texts, found)
        ]
        write_sheet(sheet_file, rows)
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("features", metavar="FEATURES", help="a file that lavis-kvmod embed wrote")
    parser.add_argument("text", nargs="+", metavar="TEXT", help="what to look for")
    parser.add_argument("--cfg-path", required=True, metavar="YAML", help="the run file they were made with")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of the run file")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="how many images for each text (default: 10)")
    parser.add_argument("--sheet", metavar="FILE", help="also write a contact sheet: .png or .html")


def main(args: argparse.Namespace) -> int:
    """Run the command, and return its exit status."""
    set_up_logging()
    try:
        found = search(args.features, args.text, args.cfg_path, options=args.options, top=args.top, sheet=args.sheet)
    except (*TOLD, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for text, images in zip(args.text, found):
        print(f"\n{text}")
        for one in images:
            print(f"  {one.score:.4f}  {one.name}")
    if args.sheet:
        print(f"\n{args.sheet}")
    return 0
