"""Markdown from texts that may hold anything: a model's output, or somebody's annotations."""

import html
import re
from typing import Iterable, List, Sequence

# Characters of a text that a table cell shows before it is cut.
LONGEST = 240

# An underscore within a word means nothing in Markdown.
_SPECIAL = re.compile(r"([\\`*{}\[\]()#|~!]|(?<!\w)_|_(?!\w))")


def escape(text: object, longest: int = LONGEST) -> str:
    """``text`` as plain words within a line or a table cell: no HTML, links, images, cells or emphasis of its own."""
    words = " ".join(str(text).split())
    if len(words) > longest:
        words = words[: longest - 1] + "…"
    return _SPECIAL.sub(r"\\\1", html.escape(words, quote=False))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A table of cells that are Markdown already (see `escape`); the columns ``right`` are aligned to the right."""
    rule = ["---:" if i in right else "---" for i in range(len(head))]
    lines: List[Sequence[str]] = [head, rule, *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
