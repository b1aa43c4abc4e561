"""`lavis-kvmod settings`, and the page that it writes."""

from pathlib import Path

from lavis_kvmod.commands import cli
from lavis_kvmod.commands.settings import filled
from lavis_kvmod.config.keys import TABLES

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_page_is_current():
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page) == page, "run: lavis-kvmod settings --write docs/settings.md"
    for name in TABLES:
        assert f"<!-- keys: {name} -->" in page, name


def test_the_command_prints_a_section(capsys, tmp_path):
    assert cli.main(["settings", "run"]) == 0
    screen = capsys.readouterr().out
    assert "| `keep_last` | 2 | a whole number above 0 |" in screen and "kv_modulation" not in screen
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- keys: model -->\nold\n<!-- end -->\nafter\n")
    assert cli.main(["settings", "--write", str(page)]) == 0
    assert "old" not in page.read_text() and "| `num_prefix_tokens` | 8 |" in page.read_text()


def test_every_key_says_what_it_means():
    for table in TABLES.values():
        for key in table.declared.keys():
            assert key.meaning and key.expected, key.name
