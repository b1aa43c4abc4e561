"""docs/pretraining.md is walked through as printed: a shell expands each command, with what the ones before have left.

Fewer scans and one epoch: what is added to a command is in `SHORTER`. The two for a cluster start run files that
tests/config/test_run_files.py runs at small geometry.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
from page_commands import ROOT, blocks

from lavis_kvmod.commands import cli, evaluate, train
from lavis_kvmod.datasets import digits as digits_data
from lavis_kvmod.demo import digits

PAGE = ROOT / "docs" / "pretraining.md"
PROGRAMS = ("python", "lavis-kvmod", "torchrun")
FEW = {"train": 64, "val": 16, "test": 24}
SHORTER = {
    "lavis.train": ["--options", "run.max_epoch=1"],
    "ablate": ["--options", "run.max_epoch=1", "--jobs", "1"],
    "capfilt": ["--itc", "-1"],  # a filter of one epoch knows nothing
}


def lines():
    """The page's commands, each with its continuations, in order."""
    return [
        line
        for block in blocks(PAGE)
        for line in re.sub(r"\\\n\s*", "", block).splitlines()
        if line.strip() and not line.startswith("#")
    ]


def as_a_shell_has_it(line, monkeypatch):
    """The words of the program that a line starts, if it starts one; what it exports is exported."""
    caught = "; ".join(f'{program}() {{ printf "%s\\0" {program} "$@" >&3; }}' for program in PROGRAMS)
    line = re.sub(r"<(\w+)>", r"\1", line)  # a placeholder
    script = f"exec 3>words 4>environment; {caught}; {line}; env -0 >&4"
    subprocess.run(["bash", "-euc", script], check=True)
    for pair in Path("environment").read_text().split("\0"):
        name, _, value = pair.partition("=")
        if name.startswith(("STAGE_", "NOISY")):
            monkeypatch.setenv(name, value)
    return Path("words").read_text().split("\0")[:-1]


def shorter(words):
    """With what makes it short, in front of what the page says where both are options."""
    for name, added in SHORTER.items():
        if name in words:
            added = list(added)
            if "--options" in words and "--options" in added:
                at = words.index("--options") + 1
                words, added = [*words[:at], added[1], *words[at:]], added[2:]
            return [*words, *added]
    return words


@pytest.fixture()
def few_scans(monkeypatch):
    some = {split: digits.load_scans(split)[:count] for split, count in FEW.items()}
    monkeypatch.setattr(digits, "load_scans", some.__getitem__)
    digits_data._pictures.cache_clear()
    yield
    digits_data._pictures.cache_clear()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_command_of_the_walk_through_works(few_scans, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for line in lines():
        words = as_a_shell_has_it(line, monkeypatch)
        if not words:
            continue
        program, *arguments = shorter(words)
        if program == "torchrun":
            assert re.search(r"/pretrain_stage[12]\.yaml$", arguments[arguments.index("--cfg-path") + 1])
        elif program == "python":
            module = {"lavis.train": train, "lavis.evaluate": evaluate}[arguments[1]]
            assert module.main(arguments[2:]) == 0, line
        else:
            assert cli.main(arguments) == 0, line
    counted = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[-1]
    capsys.readouterr()
    exec(compile(counted, str(PAGE), "exec"), {})
    assert capsys.readouterr().out.splitlines() == [
        f"kept {FEW['train']}, of them right: 45",
        "dropped 0, of them right: 0",
    ]
    assert Path("output/found.png").is_file() and Path("output/chain/report.html").is_file()
    assert len(os.listdir("output")) >= 9
