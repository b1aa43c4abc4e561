"""``lavis-kvmod card``: a model card (Hugging Face's form) of a run, from its folder."""

import argparse
import sys

from lavis_kvmod.reports.model_card import CARD, write_card
from lavis_kvmod.reports.run_files import read_run
from lavis_kvmod.system.paths import absolute
from lavis_kvmod.weights.files import CheckpointError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.epilog = "What you wrote between the marks <!-- yours --> and <!-- end --> of an earlier card stays."
    parser.add_argument("folder", metavar="FOLDER", help="of a training, with its log.txt and checkpoint")
    parser.add_argument("--name", help="of the model (default: the folder's)")
    parser.add_argument("--license", default="unknown", metavar="ID", help="of the weights, such as bsd-3-clause")
    parser.add_argument("--out", metavar="MD", help=f"default: {CARD} in the folder, where Hugging Face looks for it")


def main(args: argparse.Namespace) -> int:
    """Write the card; returns the exit status: 2 for what the user can mend."""
    try:
        folder = absolute(args.folder)
        path = absolute(args.out) if args.out else folder / CARD
        print(write_card(read_run(folder), path, name=args.name, licence=args.license))
    except (OSError, ValueError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
