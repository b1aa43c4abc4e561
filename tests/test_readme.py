"""What the pages tell a newcomer to type exists."""

import re
import runpy
import sys
from pathlib import Path

import lavis
import pytest

from lavis_kvmod.commands.cli import _COMMANDS
from lavis_kvmod.models.blip2_opt_kvmod import Blip2OPTKVMod
from lavis_kvmod.models.settings import ModelSettings
from lavis_kvmod.system.paths import resolve_config

ROOT = Path(__file__).parent.parent
LAVIS = Path(lavis.__file__).parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
CODE = "\n".join(re.findall(r"```(?:bash|python)\n(.*?)```", TEXT, re.DOTALL)) + "\n".join(
    re.findall(r"`([^`\n]+)`", TEXT)
)


def found(pattern):
    return sorted(set(re.findall(pattern, CODE)))


@pytest.mark.parametrize("target", found(r"\bmake ([a-z-]+)"))
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", found(r"projects/[\w./-]+\.yaml"))
def test_run_files_exist(path):
    assert resolve_config(path).is_file()


@pytest.mark.parametrize("path", found(r"(?<![\w./-])(?:[a-z_]\w*/)*[a-z_]\w*\.py\b"))
def test_source_files_exist(path):
    """Named from the package or from the root, or LAVIS's; those that a walk-through makes are the reader's."""
    bases = (ROOT, ROOT / "lavis_kvmod", *([LAVIS.parent] if path.startswith("lavis/") else []))
    assert path in ("ask.py", "make_folder.py", "my_parts.py", "my_train.py") or any(
        (base / path).is_file() for base in bases
    )


@pytest.mark.parametrize("module", found(r"python -m (lavis\.\w+)"))
def test_commands_answer(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as done:
        runpy.run_module(module, run_name="__main__", alter_sys=True)  # what `python -m` does
    assert done.value.code == 0 and "--cfg-path" in capsys.readouterr().out


def test_the_pages_name_every_command_and_model_type():
    assert found(r"python -m (lavis\.\w+)") == ["lavis.evaluate", "lavis.train"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.partition("\n| `lavis-kvmod …` | |\n")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"`([\w-]+)`(?=[^|]* \| )", table)) == sorted(_COMMANDS)
    for name in Blip2OPTKVMod.PRETRAINED_MODEL_CONFIG_DICT:
        assert f"`{name}`" in TEXT


def test_every_key_is_documented():
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    undocumented = {"arch", "load_pretrained", "apply_lemmatizer"}
    for key in set(ModelSettings.model_fields) - undocumented:
        assert f"`{key}`" in page, key


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", prose):
        assert (page.parent / link).exists(), link
