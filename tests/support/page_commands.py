"""The commands that the pages print, read as a shell would: for tests/docs."""

import re
import shlex
import textwrap
from pathlib import Path
from typing import Iterator, List, NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^([ ]*)```bash\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
_KEYWORDS = {"do", "done", "then"}
_KEPT = {" ": "\x00", "|": "\x01", "<": "\x02", ">": "\x03"}  # what would end a word, where it does not


class Command(NamedTuple):
    """A simple command: the page that prints it, and its words, with <run> for a placeholder."""

    page: str
    words: List[str]

    @property
    def text(self) -> str:
        """As one line."""
        return " ".join(self.words)


def blocks(page: Path) -> List[str]:
    """Its ```bash blocks."""
    return [textwrap.dedent(block) for _, block in _BLOCK.findall(page.read_text(encoding="utf-8"))]


def commands_of(block: str) -> Iterator[List[str]]:
    """The words of each simple command of a block; loops and pipes are taken apart, $(…) stays one word."""
    for line in re.sub(r"\\\n\s*", " ", block).splitlines():
        line = re.sub(r"(^|\s)#.*$", "", line)
        line = re.sub(r"\$\(.*?\)", lambda inner: _kept(inner[0]), line)
        line = re.sub(r"<(\w[\w ]*)>", lambda name: _kept(name[0]), line)
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split, lexer.commenters = True, ""
        words: List[str] = []
        for word in [*lexer, ";"]:
            if not set(word) <= set(";&|"):
                words.append(_kept(word, back=True))
                continue
            while words and words[0] in _KEYWORDS:
                words = words[1:]
            if words:
                yield words
            words = []


def _kept(text: str, back: bool = False) -> str:
    for plain, stand_in in _KEPT.items():
        text = text.replace(stand_in, plain) if back else text.replace(plain, stand_in)
    return text


def all_commands() -> List[Command]:
    """Of all pages, each once a page."""
    found = [Command(page.name, words) for page in PAGES for block in blocks(page) for words in commands_of(block)]
    return list({(command.page, command.text): command for command in found}.values())
