"""``make reference``: docs/commands.md from the commands' parsers, docs/api.md from the public docstrings.

Both pages are written whole. The tables of docs/settings.md are made by ``lavis-kvmod settings --write``.
"""

import argparse
import ast
import inspect
import re
import textwrap
from importlib import import_module
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import lavis  # noqa: F401  (activates the plugin)

from lavis_kvmod.commands import evaluate, train
from lavis_kvmod.commands.cli import _COMMANDS
from lavis_kvmod.commands.launch import argument_parser

FOLDER = Path(__file__).resolve().parent

# ------------------------------------------------------------ commands

COMMANDS_HEAD = """\
# Commands

Made from the commands' own parsers by `make reference`; `COMMAND --help` says the same. `lavis-kvmod COMMAND` and
`python -m lavis_kvmod COMMAND` are one; what each is for is told in the pages that the [start](index.md) lists.
"""


def parsers() -> Iterator[Tuple[str, argparse.ArgumentParser]]:
    """Each command as it is typed, with its parser."""
    for module in (train, evaluate):
        yield f"python -m {module.__name__.replace('lavis_kvmod.commands', 'lavis')}", argument_parser(module.__doc__)
    for name, (module_name, text) in _COMMANDS.items():
        parser = argparse.ArgumentParser(prog=f"lavis-kvmod {name}", description=text)
        import_module(module_name).add_arguments(parser)
        yield f"lavis-kvmod {name}", parser


def commands_page() -> str:
    """docs/commands.md."""
    return "\n".join([COMMANDS_HEAD, *(_command(name, parser) for name, parser in parsers())])


def _command(name: str, parser: argparse.ArgumentParser) -> str:
    about = re.sub(r"^``.*?``: ", "", parser.description or "").strip()
    texts = [paragraph[0].upper() + paragraph[1:].rstrip(".") + "." for paragraph in about.split("\n\n")]
    rows = [_argument(action) for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    tables = ["\n".join(["| | | |", "|---|---|---|", *rows, ""])] if rows else []
    return "\n".join(
        [f"## `{name}`", "", "\n\n".join(texts), "", *tables, *([parser.epilog, ""] if parser.epilog else [])]
    )


def _argument(action: argparse.Action) -> str:
    name = " ".join([*action.option_strings[:1], _value(action)]).strip()
    told = (action.help or "") % {**vars(action), "prog": ""}
    needed = action.required and bool(action.option_strings or action.nargs not in ("?", "*"))
    return f"| `{name}` | {'needed' if needed else ''} | {told.replace('*', chr(92) + '*')} |"


def _value(action: argparse.Action) -> str:
    """What is written behind an option, or in the place of an argument."""
    if action.nargs == 0:
        return ""
    value = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else ""
    value = str(action.metavar or value or action.dest.upper())
    return f"{value} …" if action.nargs == "+" else value


# ------------------------------------------------------------ API

API_HEAD = """\
# API

Made from the docstrings by `make reference`. LAVIS's own functions, such as `load_model_and_preprocess`, take the
model's names; see [the first ten minutes](first_ten_minutes.md). Shapes have one legend: `b` batch, `n` visual tokens,
`q` query tokens, `p` prefix tokens, `h` heads, `d` head width, `t` text tokens.
"""

# What is public, with the methods that a caller needs.
PUBLIC: Dict[str, List[str]] = {
    "lavis_kvmod.Blip2OPTKVMod": [
        *("from_config", "load_checkpoint", "forward", "generate", "predict_answers", "extract_features", "encode"),
        "attention_maps",
    ],
    "lavis_kvmod.KVPrefixGenerator": ["forward"],
    "lavis_kvmod.Backbone": [],
    "lavis_kvmod.register_auxiliary_encoder": [],
    "lavis_kvmod.register_image_encoder": [],
    "lavis_kvmod.register_connector": [],
    "lavis_kvmod.models.blip2_kvmod.Blip2KVMod": ["forward", "extract_features"],
    "lavis_kvmod.models.attention_maps.AttentionMaps": ["prefix_share", "on_grid"],
    "lavis_kvmod.models.loading.load_checkpoint": [],
    "lavis_kvmod.commands.train.train": [],
    "lavis_kvmod.commands.evaluate.evaluate": [],
    "lavis_kvmod.config.loading.load_config": [],
    "lavis_kvmod.datasets.images.read_image": [],
}

_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields):$", re.M)


def api_page() -> str:
    """docs/api.md."""
    parts = [API_HEAD]
    for path, methods in PUBLIC.items():
        module, _, name = path.rpartition(".")
        found = getattr(import_module(module), name)
        parts.append(_entry("##", path, found))
        parts += [_entry("###", f"{name}.{method}", getattr(found, method)) for method in methods]
    return "\n".join(parts)


def _entry(level: str, name: str, found: Any) -> str:
    short = name.rpartition(".")[2]
    fields = getattr(found, "__dataclass_fields__", None)
    how = f"{short}({', '.join(fields)})" if fields else _signature(found, short)
    return "\n".join([f"{level} `{name}`", "", "```python", how, "```", "", _as_markdown(inspect.getdoc(found) or "")])


def _signature(found: Any, name: str) -> str:
    """As it is written in the source, so that it is the same under every Python."""
    called = found.__init__ if inspect.isclass(found) else found
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(getattr(called, "__func__", called))))
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    written = "\n".join(source.splitlines()[function.lineno - 1 : function.body[0].lineno - 1])
    head = re.sub(r"^def \w+\(", f"{name}(", written.split('"""')[0].rstrip().rstrip(":"))
    return re.sub(r"(?<=\()\s*(self|cls),?\s*", lambda place: "\n    " if "\n" in place[0] else "", head)


def _as_markdown(docstring: str) -> str:
    """Google's sections as lists; the rest is Markdown but for its doubled backticks."""
    pieces = _SECTION.split(docstring.replace("``", "`"))
    parts = [pieces[0].strip(), ""]
    for title, body in zip(pieces[1::2], pieces[2::2]):
        below, _, after = body.strip("\n").partition("\n\n")
        if title in ("Returns", "Yields"):
            listed = [textwrap.dedent(below).replace("\n", "\n  ")]
        else:
            items = re.sub(r"\n\s{2,}", " ", textwrap.dedent(below)).splitlines()
            listed = [re.sub(r"^([\w*, …]+): ", r"`\1`: ", item) for item in items]
        names = {"Args": "Arguments"}.get(title, title)
        parts += [f"**{names}**", "", *(f"- {item}" for item in listed), "", textwrap.dedent(after).strip(), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).strip() + "\n"


PAGES: Dict[Path, Callable[[], str]] = {FOLDER / "commands.md": commands_page, FOLDER / "api.md": api_page}


def main() -> None:
    """Write both pages."""
    for path, page in PAGES.items():
        path.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
