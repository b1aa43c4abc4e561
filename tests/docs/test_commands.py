"""Every command on a page is run, or read by its own parser and checked as far as it can be without being run.

A command that nothing here knows fails: give it a rule, and if it cannot be run the reason.
"""

import argparse
import glob
import re
import shutil
import subprocess
from functools import lru_cache
from importlib import import_module
from pathlib import Path

import pytest
from page_commands import PAGES, ROOT, all_commands, blocks

from lavis_kvmod.commands import cli, evaluate, train
from lavis_kvmod.commands.launch import parse_args
from lavis_kvmod.config.loading import load_config
from lavis_kvmod.doctor import run_file
from lavis_kvmod.system.paths import resolve_config
from lavis_kvmod.system.schema import ConfigurationError

COMMANDS = all_commands()
FULL_SIZE = r"projects/kvmod/(eval/|vqa|custom|artquest|pretrain_stage)"

# Said of what is not there (as `lavis-kvmod doctor` tells it from what is wrong), the reader's own checkpoint included.
ABSENT = re.compile(f"{run_file._ABSENT.pattern}|a checkpoint is needed here; got none", re.IGNORECASE)

# Why a command is not run here: the words it is known by, and the reason or the test that runs it.
NOT_RUN = {
    rf"^python -m lavis\.(train|evaluate) --cfg-path {FULL_SIZE}": "a GPU, gigabytes of weights and of data",
    r"^(torchrun|srun) .*(nproc_per_node=[48]|ntasks-per-node=8)": "several GPUs or machines",
    r"^torchrun --nproc_per_node=2 .*demo_vqa": "tests/commands/test_demo.py::test_two_processes_train_it",
    r"--device cuda$": "a GPU",
    r"^lavis-kvmod app": "tests/commands/test_app.py::test_in_chromium_a_question_is_answered",
    r"^lavis-kvmod ablate": "tests/commands/test_ablate.py::test_a_study_is_trained_gone_on_with_and_told",
    r"^lavis-kvmod convert": "tests/commands/test_convert.py::test_the_documented_commands_work",
    r"^lavis-kvmod pack": "tests/commands/test_pack.py::test_the_pages_run_file_section_builds",
    r"^lavis-kvmod memory": "tests/commands/test_memory.py::test_the_docs_show_what_the_command_prints",
    r"^lavis-kvmod capfilt": "tests/commands/test_search.py::test_texts_are_written_judged_and_kept",
    r"mine\.yaml|^python (make_folder|ask)\.py|^BEST=": (
        "tests/datasets/test_own_files_end_to_end.py::test_the_walk_through_works_as_printed"
    ),
    r"^pip install|^source \.venv": "tests/test_install.py::test_the_console_script_answers",
    r"^make (demo|bench|test)": "minutes, or all of this",
    r"^python -m pytest": "it is this",
    r"^(git clone|cd|export|mkdir|for|curl|unzip|rm|tar|head)\b": "downloads, and what a shell does around them",
}

# The reader's own run files, and one that does as well.
STAND_INS = {
    "RUN.yaml": "projects/kvmod/demo_vqa.yaml",
    "run.yaml": "projects/kvmod/demo_vqa.yaml",
    "mine.yaml": "projects/kvmod/demo_vqa.yaml",
}


def reason(command):
    if command.page == "pretraining.md":
        return "tests/docs/test_pretraining.py::test_every_command_of_the_walk_through_works"
    found = [why for words, why in NOT_RUN.items() if re.search(words, command.text)]
    return found[0] if found else None


# ------------------------------------------------------------ every command is read


def stand_in(command, path):
    return STAND_INS.get(f"{command.page} {path}", STAND_INS.get(path, path))


def wrong(command, cfg_path, options):
    """What is wrong with a run file and options, but for what is only not there."""
    return wrong_with(stand_in(command, cfg_path), *options)


@lru_cache(maxsize=None)
def wrong_with(cfg_path, *options):
    try:
        load_config(cfg_path, options, starts=False)
        return []
    except ConfigurationError as error:
        return [problem for problem in error.problems if not ABSENT.search(problem)]


def read_lavis(command, module, words):
    assert module in ("lavis.train", "lavis.evaluate")
    args = parse_args("", words)
    is_evaluation = ["run.evaluate=true"] if module == "lavis.evaluate" else []
    assert not wrong(command, args.cfg_path, [*args.options, *is_evaluation])


def read_ours(command, words):
    name, *rest = words
    parser = argparse.ArgumentParser()
    import_module(cli._COMMANDS[name][0]).add_arguments(parser)
    args = parser.parse_args(rest)
    for key in ("cfg_path", "captioner"):
        path = getattr(args, key, None)
        if path is not None:
            options = args.options if key == "cfg_path" else args.captioner_options
            assert not wrong(command, path, options)
    if name == "ablate":
        assert (ROOT / args.study).is_file()  # of those tests/commands/test_ablate.py checks all that they say
        assert args.write is None or (ROOT / args.write).is_file()


def read_python(command, words):
    if words[:2] == ["-m", "pytest"]:
        assert (ROOT / words[2]).exists()
    elif words[0] == "-m":
        read_lavis(command, words[1], words[2:])
    else:
        text = (ROOT / "docs" / command.page).read_text(encoding="utf-8")
        assert text.count(f"`{words[0]}`") >= 1  # the page says what is in it


def read_torchrun(command, words):
    from torch.distributed.run import get_args_parser

    args = get_args_parser().parse_args(words)
    assert args.module
    read_lavis(command, args.training_script, args.training_script_args)


def read_pip(command, words):
    from importlib.metadata import metadata

    assert words[0] == "install"
    known = set(metadata("lavis-kvmod").get_all("Provides-Extra"))
    assert set(re.findall(r"\[(\w+)\]", " ".join(words))) <= known | {"docs"}


def read_make(command, words):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{words[0]}:.*## ", makefile, re.MULTILINE)


READERS = {
    "lavis-kvmod": read_ours,
    "python": read_python,
    "torchrun": read_torchrun,
    "srun": lambda command, words: read_python(command, words[words.index("python") + 1 :]),
    "pip": read_pip,
    "make": read_make,
}
SHELL = {"git", "cd", "export", "mkdir", "for", "curl", "unzip", "rm", "tar", "head", "source", "BEST=$(ls"}


@pytest.fixture()
def no_network(monkeypatch):
    monkeypatch.setattr("lavis_kvmod.weights.downloads.reachable", lambda url: False)


@pytest.mark.parametrize("page", sorted({command.page for command in COMMANDS}))
def test_commands_are_what_their_parsers_and_the_check_of_run_files_take(page, no_network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS:
        if command.page != page:
            continue
        program, *words = command.words
        assert program in READERS or program.split(" ")[0] in SHELL, (
            f"{command.text}: no rule here tells how to check it"
        )
        try:
            READERS.get(program, lambda command, words: None)(command, words)
        except (AssertionError, SystemExit) as error:  # argparse ends with the latter
            raise AssertionError(f"{command.text}: {error}") from error


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_stands_within_a_line_names_commands_and_options_that_are_there(page):
    parsers = {}
    for inline in re.findall(r"`lavis-kvmod ([^`]+)`", page.read_text(encoding="utf-8")):
        name, *words = inline.split()
        if name == "…" or name.isupper() or inline.startswith("could not be activated"):  # a message
            continue
        assert name in cli._COMMANDS, f"lavis-kvmod {inline}"
        if name not in parsers:
            parsers[name] = argparse.ArgumentParser()
            import_module(cli._COMMANDS[name][0]).add_arguments(parsers[name])
        for word in words:
            assert not word.startswith("--") or word in parsers[name]._option_string_actions, f"lavis-kvmod {inline}"


def test_the_blocks_are_bash():
    script = "\n".join(re.sub(r"<(\w[\w ]*)>", "X", block) for page in PAGES for block in blocks(page))
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_the_tests_that_are_said_to_run_commands_are_there():
    for why in NOT_RUN.values():
        file, _, name = why.partition("::")
        assert not name or f"def {name}" in (ROOT / file).read_text(encoding="utf-8"), why
    for words in NOT_RUN:
        assert any(re.search(words, command.text) for command in COMMANDS), f"{words}: no page has such a command"


# ------------------------------------------------------------ and run, where it can be

SHORT = "run.max_iters=2"  # so that a training ends soon; the commands are as printed otherwise
TO_RUN = [command for command in COMMANDS if reason(command) is None]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Where a reader stands who has run the demo: output/demo_vqa and output/demo hold runs of two steps."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train.main(["--cfg-path", "projects/kvmod/demo_vqa.yaml", "--options", SHORT]) == 0
    for name in ("with_prefix", "without_prefix"):
        shutil.copytree(folder / "output" / "demo_vqa", folder / "output" / "demo" / name)
    return folder


@pytest.fixture()
def reader(trained, tmp_path, monkeypatch):
    """The folder of a reader who has a scan, and what the demo leaves."""
    from lavis_kvmod.demo import digits

    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "output", "output")
    digits.render(digits.load_scans("test")[0]).save("scan.png")
    return tmp_path


def newest(pattern):
    return max(glob.glob(pattern), key=lambda name: Path(name).stat().st_mtime)


def expanded(word, folder):
    """As a shell has it; <run> is the newest one, and /data is the reader's."""
    word = re.sub(r"\$\((.*?)\)", lambda inner: subprocess.check_output(inner[1], shell=True, text=True).strip(), word)
    word = re.sub("(^|=)/data/", rf"\1{folder}/data/", word)
    key, equals, path = word.rpartition("=")
    return f"{key}{equals}{newest(path.replace('<run>', '*'))}" if "<run>" in word else word


def run(command, folder):
    words = [stand_in(command, expanded(word, folder)) for word in command.words]
    if words[1] in ("embed", "search"):  # by the model that the page has trained before
        words += ["--options", f"model.finetuned={newest('output/demo_stage1/*/checkpoint_best.pth')}"]
    if words[0] == "lavis-kvmod":
        return cli.main(words[1:])
    assert words[:2] == ["python", "-m"], command.text
    if words[2] == "lavis.train":
        words += [*([] if "--options" in words else ["--options"]), SHORT]
    return {"lavis.train": train, "lavis.evaluate": evaluate}[words[2]].main(words[3:])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", sorted({command.page for command in TO_RUN}))
def test_what_a_cpu_can_run_runs(page, reader):
    for command in TO_RUN:
        if command.page == page:
            # The doctor finds no GPU and no weights for a run of full size, and says so.
            expected = 1 if "doctor" in command.text and re.search(FULL_SIZE, command.text) else 0
            assert run(command, reader) == expected, command.text


@pytest.mark.slow
def test_the_first_ten_minutes_python_asks_the_demos_model(reader, capsys):
    text = (ROOT / "docs" / "first_ten_minutes.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(code, {})
    said = re.search(r"^a green one on pink paper -> \['(\w+)'\]$", capsys.readouterr().out, re.MULTILINE)
    assert said and f"{said[0].partition('->')[0]}-> ['green']" in text  # what a whole training answers


def test_most_of_what_needs_no_gpu_is_run():
    assert all(resolve_config(path).is_file() for path in STAND_INS.values()) and len(TO_RUN) >= 15
