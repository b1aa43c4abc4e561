"""docs/reliability.md speaks of the faults that are tried, and of no others."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_has_a_row_for_every_fault(faults):
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    table = page[page.index("| fault |") :].split("\n\n")[0]
    named = [re.match(r"\| ([^|]+?) \|", row)[1] for row in table.splitlines()[2:]]
    assert named == list(faults)
