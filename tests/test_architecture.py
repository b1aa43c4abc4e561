"""The house of docs/architecture.md: imports run downwards, functions are short, and the page tells of today."""

import ast
import re
import runpy
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lavis_kvmod.models.blip2_opt_kvmod import Blip2OPTKVMod

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lavis_kvmod"
LONGEST_FUNCTION = 60
LONGEST_FIGURE = 300


def test_every_import_runs_downwards(capfd):
    cli = pytest.importorskip("importlinter.cli", reason="import-linter wants Python 3.10")
    status = cli.lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True)
    assert status == cli.EXIT_STATUS_SUCCESS, capfd.readouterr().out


def test_no_function_is_long_without_a_reason():
    too_long = []
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                length = node.end_lineno - node.lineno + 1
                if length > LONGEST_FUNCTION and not lines[first - 2].strip().startswith("# Long:"):
                    too_long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {length} lines")
    assert not too_long, f"split them, or say why not in a comment above: '# Long: …'\n{too_long}"


def test_the_figure_is_one_short_file():
    lines = (PACKAGE / "models" / "blip2_opt_kvmod.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LONGEST_FIGURE


def test_the_lists_of_rooms_are_of_today():
    pytest.importorskip("importlinter", reason="import-linter wants Python 3.10")
    made = runpy.run_path(str(ROOT / "docs" / "map.py"))
    for page, block in made["PAGES"].items():
        written, today = made["BLOCK"].search(page.read_text(encoding="utf-8"))[0], block()
        words = [re.sub(r"\d[\d,]*", "#", text).split() for text in (written, today)]
        assert words[0] == words[1], f"{page.name} lists other rooms: make map"
        numbers = [[int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*", text)] for text in (written, today)]
        assert numbers[0] == pytest.approx(numbers[1], rel=0.1, abs=20), f"{page.name} has old numbers: make map"


def test_every_folder_is_a_room():
    """A folder without `__init__.py` would be in no list, nor in a wheel."""
    assert not [
        str(folder.relative_to(ROOT))
        for folder in PACKAGE.rglob("*")
        if folder.is_dir() and folder.name != "__pycache__" and not (folder / "__init__.py").is_file()
    ]


def test_the_figure_has_the_models_shapes():
    config = OmegaConf.load(Blip2OPTKVMod.default_config_path("pretrain_opt2.7b")).model
    model = Blip2OPTKVMod.without_weights(config)
    _, n, width = model.visual_encoder.pos_embed.shape
    p, hidden = model.kv_prefix.prefix_tokens.shape
    q, h = model.query_tokens.shape[1], model.kv_prefix.num_heads
    shapes = [(3, model.image_size, model.image_size), (n, width), (model.aux_encoder.feature_dim,)]
    shapes += [(h, p, hidden // h), (q, hidden), (q, model.opt_proj.out_features)]
    figure = (ROOT / "docs" / "figure.svg").read_text(encoding="utf-8")
    assert re.findall(r"\(b,([\d,]+)\)", figure) == [",".join(map(str, shape)) for shape in shapes]
    assert f"over all {p + n}" in figure
