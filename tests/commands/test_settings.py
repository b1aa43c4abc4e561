"""`lavis-kvmod settings`, and the page that it writes."""

from pathlib import Path

from lavis.common.registry import registry
from omegaconf import OmegaConf

from lavis_kvmod.commands import cli
from lavis_kvmod.commands.settings import filled
from lavis_kvmod.config.keys import TABLES
from lavis_kvmod.datasets.packaged import PackagedBuilder

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_pages_are_current():
    for path in PAGE.parent.glob("*.md"):
        page = path.read_text(encoding="utf-8")
        assert filled(page) == page, f"run: lavis-kvmod settings --write docs/{path.name}"
    for name in TABLES:
        assert f"<!-- keys: {name} -->" in PAGE.read_text(encoding="utf-8"), name


def test_default_files_of_data_sets_say_what_is_declared():
    for name in registry.list_datasets():
        builder = registry.get_builder_class(name)
        if not issubclass(builder, PackagedBuilder):
            continue
        (section,) = OmegaConf.load(builder.default_config_path()).datasets.values()
        assert builder.section_problems(section) == [], name
        for key in set(section) - {"build_info", "vis_processor", "text_processor"}:
            assert section[key] == builder.settings_class.default_of(key), f"{name}.{key}"


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
