"""Comes last (pytest goes by file names), and looks at what those before have recorded."""

from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_all_that_was_promised_was_tried(request, record, faults):
    """At least 25 kills among it."""
    collected = {item.path for item in request.session.items}
    wanted = set(Path(__file__).parent.glob("test_*.py")) - {Path(__file__).with_name("test_page.py")}
    if not collected >= wanted:
        pytest.skip("only a part of the suite is run")
    tried = {row["fault"]: row["tried"] for row in record.rows()}
    assert list(tried) == list(faults)
    kills = sum(number for fault, number in tried.items() if fault.startswith("killed"))
    assert kills >= 25
