"""Every key of a run file that lavis-kvmod declares: its default, what it may be, what it means."""

import argparse
import re
import sys
from pathlib import Path
from typing import Any, Optional

from lavis_kvmod.config.keys import TABLES, Table

_PLACE = re.compile(r"(<!-- keys: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    sections = sorted({table.section for table in TABLES.values()})
    parser.add_argument("section", nargs="?", choices=sections, help="that section alone")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the tables into their places in this page")


def main(args: argparse.Namespace) -> Optional[int]:
    """Print the tables, or write them."""
    if args.write is not None:
        args.write.write_text(filled(args.write.read_text(encoding="utf-8")), encoding="utf-8")
        return None
    for name, table in TABLES.items():
        if args.section in (None, table.section):
            sys.stdout.write(f"{table.section}: ({name})\n\n{markdown(table)}\n")
    return None


def filled(page: str) -> str:
    """A page with its tables, each between ``<!-- keys: NAME -->`` and ``<!-- end -->``, written anew.

    Raises:
        KeyError: for a name that no table has.
    """
    return _PLACE.sub(lambda place: f"{place[1]}{markdown(TABLES[place[2]])}{place[3]}", page)


def markdown(table: Table) -> str:
    """The keys of a table in Markdown."""
    rows = [
        f"| `{key.name}` | {_default(key.default)} | {key.expected} | {key.meaning} |\n"
        for key in table.declared.keys(inherited=False)
        if key.name not in table.hidden
    ]
    return "".join(["| key | default | may be | meaning |\n|---|---|---|---|\n", *rows])


def _default(value: Any) -> str:
    if value is None or value in ("", {}):
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list):
        return f"`[{', '.join(value)}]`"
    if isinstance(value, float):
        return f"{value:g}"
    return f"`{value}`" if isinstance(value, str) else str(value)
