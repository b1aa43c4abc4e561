"""docs/reliability.md speaks of the faults that are tried, and of no others; a record of them is not lost."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_has_a_row_for_every_fault(faults):
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    table = page[page.index("| fault |") :].split("\n\n")[0]
    named = [re.match(r"\| ([^|]+?) \|", row)[1] for row in table.splitlines()[2:]]
    assert named == list(faults)


def test_a_part_of_the_suite_replaces_only_its_own_rows(record, tmp_path):
    def session(**times):
        made = type(record)()
        for fault, number in times.items():
            with made.attempt(fault.replace("_", " "), times=number):
                pass
        made.write(tmp_path / "faults.json")

    session(disk_full=3, rank_killed=2)
    session(disk_full=1, NaN_batch=4)
    rows = json.loads((tmp_path / "faults.json").read_text())
    assert [(row["fault"], row["tried"]) for row in rows] == [("rank killed", 2), ("disk full", 1), ("NaN batch", 4)]
