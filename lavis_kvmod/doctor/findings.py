"""What doctor found, as lines of text."""

import textwrap
from typing import Iterable, List, NamedTuple, Sequence

OK = "ok"
NOTE = "note"  # nothing is wrong, and good to know
WARN = "warn"  # works, perhaps not as wanted
MISSING = "missing"  # not there, and nothing runs without it
WRONG = "wrong"  # there, and keeps things from running

STOPS = (MISSING, WRONG)


class Finding(NamedTuple):
    """One line, and the next step where there is one."""

    mark: str
    text: str
    step: str = ""


class Section(NamedTuple):
    """Findings under a heading."""

    title: str
    findings: Sequence[Finding]


def stops(sections: Iterable[Section]) -> List[Finding]:
    """What keeps things from running."""
    return [finding for section in sections for finding in section.findings if finding.mark in STOPS]


def render(sections: Iterable[Section], columns: int = 120) -> str:
    """Plain text: a mark before each finding, ``->`` before its next step."""
    width = max(map(len, (OK, NOTE, WARN, MISSING, WRONG)))
    lines = []
    for section in sections:
        lines.append(section.title)
        for finding in section.findings:
            lines += _wrapped(f"  {finding.mark:<{width}}  ", finding.text, columns)
            if finding.step:
                lines += _wrapped(f"  {'':<{width}}  -> ", finding.step, columns)
    return "\n".join(lines)


def _wrapped(start: str, text: str, columns: int) -> List[str]:
    rest = " " * len(start)
    lines = textwrap.wrap(
        text,
        columns,
        initial_indent=start,
        subsequent_indent=rest,
        break_long_words=False,  # paths and commands are there to be copied
        break_on_hyphens=False,
    )
    return lines or [start]
