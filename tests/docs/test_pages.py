"""The pages of docs/: all in the site's navigation, anchors there, generated parts current, messages real."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]


def text_of(page):
    return page.read_text(encoding="utf-8")


def anchors_of(page):
    """As GitHub makes them of headings, and mkdocs.yml's slugify does."""
    prose = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_anchors_of_links_are_headings(page):
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text_of(page), flags=re.DOTALL)
    for file, anchor in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", prose):
        assert anchor in anchors_of(page.parent / file if file else page), f"{file}#{anchor}"


def test_every_page_is_in_the_sites_navigation():
    nav = text_of(ROOT / "mkdocs.yml").partition("\nnav:\n")[2]
    named = re.findall(r"(\w+\.md)$", nav, re.MULTILINE)
    assert sorted(named) == sorted(page.name for page in DOCS.glob("*.md")), "nav in mkdocs.yml"
    assert yaml.safe_load(nav)


def test_every_picture_is_shown_and_small():
    for picture in [*DOCS.glob("*.svg"), *(DOCS / "images").iterdir()]:
        assert picture.stat().st_size <= 200_000, picture
        assert any(f"{picture.name})" in text_of(page) for page in PAGES), f"{picture.name} is on no page"


@pytest.mark.filterwarnings("ignore")
def test_commands_and_api_are_current():
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    for path, page in made.PAGES.items():
        assert page() == text_of(path), f"run: make reference ({path.name})"


def messages_of_the_package():
    """Every text in the source, with … where something is put in; log messages' %s and %d are put in, too."""
    found = []
    for path in sorted((ROOT / "lavis_kvmod").rglob("*.py")):
        for node in ast.walk(ast.parse(text_of(path))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[sdr]", "…", node.value))
    return found


OTHERS = {  # of pip, Python, LAVIS and PyTorch
    "No matching distribution found for tokenizers",
    "numpy.core.multiarray failed to import",
    "No module named 'pkg_resources'",
    "libGL.so.1: cannot open shared object file",
    "operator torchvision::nms does not exist",
    "No module named lavis.train",
    "'NoneType' object has no attribute 'from_pretrained'",
    "CUDA out of memory",
    "Address already in use",
    # put together of several texts, by tests/weights and tests/datasets
    "unexpected",
    "not readable: …",
}


def test_the_messages_of_the_troubleshooting_page_are_still_said():
    rows = re.findall(r"^\| (`.+?`[^|]*) \|", text_of(DOCS / "troubleshooting.md"), re.MULTILINE)
    quoted = [re.match(r"`(.+?)`(?!`)", row)[1] for row in rows]
    texts, unknown = "\0".join(messages_of_the_package()), []
    for message in quoted:
        pattern = r"[^\0]*?".join(re.escape(piece) for piece in re.split(r"\s*…\s*", message) if piece)
        if message not in OTHERS and not re.search(pattern, texts):
            unknown.append(message)
    assert not unknown and len(quoted) > 40
    assert set(quoted) >= OTHERS


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("material", reason='the site takes pip install "lavis-kvmod[docs]"')
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.stem for path in (tmp_path / "site").glob("*.html")}
    assert pages == {page.stem for page in DOCS.glob("*.md")} | {"404"}
    for page in (tmp_path / "site").glob("*.html"):  # nothing is fetched from anywhere
        assert not re.search(r'<(?:script|link|img)[^>]*(?:src|href)="https?:', text_of(page)), page.name
