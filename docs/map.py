"""``make map``: the lists of rooms and their lines in README.md and docs/architecture.md, made from the package.

A room is a folder of the package, or a file at its top; its meaning is the first paragraph of its docstring, its floor
the place it has among import-linter's layers in pyproject.toml. What stands in the pages between ``<!-- rooms -->`` and
``<!-- /rooms -->`` is written anew.
"""

import ast
import re
import textwrap
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple

from importlinter.api import read_configuration

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lavis_kvmod"
BLOCK = re.compile(r"(?<=<!-- rooms -->\n).*?(?=\n<!-- /rooms -->)", re.DOTALL)


class Room(NamedTuple):
    """A folder, or a file at the package's top; lines are of all files in it, its own folders' too."""

    path: Path
    floor: int
    meaning: str
    files: int
    lines: int

    @property
    def name(self) -> str:
        """As the pages write it: ``models/vision/``, ``plugin.py``."""
        return self.path.relative_to(PACKAGE).as_posix() + ("/" if self.path.is_dir() else "")

    @property
    def is_inside(self) -> bool:
        """Whether it is part of another room."""
        return self.path.parent != PACKAGE


def rooms() -> List[Room]:
    """From the top floor to the lowest; a room's own folders behind it."""
    layers = read_configuration(str(ROOT / "pyproject.toml"))["contracts_options"][0]["layers"]
    found = []
    for depth, layer in enumerate(layers):
        for name in re.sub("[|:]", " ", layer).split():
            top = PACKAGE / name if (PACKAGE / name).is_dir() else PACKAGE / f"{name}.py"
            inside = sorted(init.parent for init in top.rglob("__init__.py") if init.parent != top)
            found += [_room(path, len(layers) - depth) for path in [top, *inside]]
    return found


def _room(path: Path, floor: int) -> Room:
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    docstring = ast.get_docstring(ast.parse(files[0].read_text(encoding="utf-8"))) or ""  # __init__.py sorts first
    meaning = " ".join(docstring.split("\n\n")[0].split()).replace("``", "`").rstrip(".:")
    return Room(path, floor, meaning, len(files), sum(len(file.read_text("utf-8").splitlines()) for file in files))


def table() -> str:
    """For docs/architecture.md."""
    lines = ["| floor | room | what is in it | files | lines |", "|---:|---|---|---:|---:|"]
    for room in rooms():
        floor = "" if room.is_inside else room.floor
        lines.append(f"| {floor} | `{room.name}` | {room.meaning} | {room.files} | {room.lines:,} |")
    return "\n".join(lines)


def sentence() -> str:
    """For README.md."""
    tops = [room for room in rooms() if not room.is_inside]
    folders = ", ".join(f"`{room.name}` {room.lines:,}" for room in tops if room.path.is_dir())
    whole = _room(PACKAGE, 0)
    return textwrap.fill(f"{whole.lines:,} lines of Python in {whole.files} files: {folders}.", 120)


PAGES: Dict[Path, Callable[[], str]] = {ROOT / "docs" / "architecture.md": table, ROOT / "README.md": sentence}


def main() -> None:
    """Write the blocks of all pages."""
    for page, block in PAGES.items():
        text = page.read_text(encoding="utf-8")
        page.write_text(BLOCK.sub(lambda _, block=block: block(), text), encoding="utf-8")


if __name__ == "__main__":
    main()
