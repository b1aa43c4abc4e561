"""Real installs into throw-away environments, seen from fresh interpreters in another folder.

Each environment borrows the dependencies from the one that runs the tests, by a `.pth` file. The
hook of that one cannot leak in, because `.pth` files inside a folder added like this are not read.
Importing what LAVIS imports takes seconds, so one interpreter for each way of installing does that, and what is asked
of LAVIS is asked in its children.
"""

import json
import os
import shutil
import subprocess
import sys
import venv
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGED = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "lavis_kvmod.pth")
PACKAGED_FOLDERS = ("lavis_kvmod", "configs", "projects", "studies")
# `pip install .` makes a wheel, and installs it.
WAYS = [pytest.param(way, marks=pytest.mark.slow) for way in ("wheel", "pip install .", "pip install -e .")]

# Runs each code of a JSON object in a child of its own, and prints their exit codes and what they wrote.
CHILDREN = r"""
import json, os, sys, tempfile, traceback
import cv2, decord, fairscale.nn.checkpoint, iopath, pandas, pycocotools.coco, skimage, spacy, timm, torch, torchvision
import transformers.modeling_utils, webdataset

def child(code):
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    status = 0
    try:
        exec(code, {"__name__": "__main__"})
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

done = {}
for name, code in json.loads(sys.argv[1]).items():
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        pid = os.fork() or child(code)
        status = os.waitpid(pid, 0)[1]
        out.seek(0)
        err.seek(0)
        done[name] = {"returncode": os.WEXITSTATUS(status), "stdout": out.read(), "stderr": err.read()}
print(json.dumps(done))
"""

# What a user meets after `import lavis`. lavis_kvmod is imported by name only once that is seen.
FACTS = r"""
import contextlib, io, json, runpy, sys
from lavis.models import load_model_and_preprocess, model_zoo

def error(*args):
    try:
        load_model_and_preprocess(*args)
    except Exception as error:
        return {"types": [cls.__name__ for cls in type(error).__mro__], "text": str(error)}

def command_help(name):
    out, sys.argv = io.StringIO(), [name, "--help"]
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        runpy.run_module(name, run_name="__main__", alter_sys=True)  # what `python -m` does
    return out.getvalue()

facts = {
    "model types": dict(model_zoo).get("blip2_opt_kvmod"),
    "no model type": error("blip2_opt_kvmod"),
    "default model type": error("blip2_opt_kvmod", "pretrain_opt2.7b"),
    "another model type": error("blip2_opt_kvmod", "caption_coco_opt6.7b"),
    "stock model": error("blip2_opt"),
    "train": command_help("lavis.train"),
    "evaluate": command_help("lavis.evaluate"),
}
from lavis_kvmod.system import paths
facts["package"] = paths.__file__
facts["model config"] = str(paths.resource("configs/models/blip2_opt_kvmod/demo.yaml"))
facts["run file"] = str(paths.resolve_config("projects/kvmod/vqa.yaml"))
print(json.dumps(facts))
"""
# As `python -m lavis.train --help` does.
DASH_M = """
import runpy, sys
sys.argv = ["-m", "--help"]
runpy._run_module_as_main("lavis.train")
"""
BROKEN = """
import sys
sys.modules["lavis_kvmod.tasks.vqa"] = None  # as if the file were broken
from lavis.models import model_zoo
print("blip2_opt" in dict(model_zoo), "blip2_opt_kvmod" in dict(model_zoo))
"""


class Environment:
    """A virtual environment with all that lavis-kvmod depends on, and a folder elsewhere; or one that is there."""

    def __init__(self, folder):
        self.folder = folder
        self.bin = folder / "venv" / "bin"
        self.elsewhere = folder / "elsewhere"
        if not self.elsewhere.exists():
            venv.create(folder / "venv", with_pip=False)
            self.elsewhere.mkdir()
        (self.site_packages,) = (folder / "venv").glob("lib/python*/site-packages")
        (self.site_packages / "dependencies.pth").write_text("\n".join(_dependency_folders()))

    def pip(self, *args):
        target = ("--python", str(self.bin / "python"))
        _succeed([sys.executable, "-m", "pip", *target, *args], cwd=self.elsewhere)

    def install(self, *what):
        # Offline, with the borrowed build tools, and even if lavis-kvmod is in a borrowed folder.
        rules = ("--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed")
        self.pip("install", *rules, *what)

    def run(self, program, *args, **env):
        """Run a program of this environment from elsewhere, offline and without cached weights."""
        own = {k: v for k, v in os.environ.items() if not k.startswith(("LAVIS_", "PYTHON"))}
        caches = {name: str(self.elsewhere / "cache") for name in ("HF_HOME", "TORCH_HOME")}
        return subprocess.run(
            [str(self.bin / program), *args],
            cwd=self.elsewhere,
            env={**own, **caches, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", **env},
            capture_output=True,
            text=True,
        )

    def run_children(self, **codes):
        """Run some code, each in a child of an interpreter that has imported what LAVIS imports."""
        done = self.run("python", "-c", CHILDREN, json.dumps(codes))
        assert done.returncode == 0, done.stderr
        return {name: SimpleNamespace(**of) for name, of in json.loads(done.stdout.splitlines()[-1]).items()}


def _dependency_folders():
    modules = ("lavis", "torch", "efficientnet_pytorch", "setuptools", "wheel")
    return sorted({str(Path(find_spec(name).origin).parents[1]) for name in modules})


def _succeed(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr


def _copy_source(folder):
    """What is packaged, so that building leaves nothing in the working tree."""
    folder.mkdir()
    for name in PACKAGED:
        shutil.copy(ROOT / name, folder)
    for name in PACKAGED_FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = _copy_source(folder / "source")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    _succeed([*build, "--wheel-dir", str(folder), str(source)], cwd=folder)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="session")
def install(wheel, tmp_path_factory):
    """A function: an environment into which it was installed in one of the ways, once a way."""

    @lru_cache(maxsize=None)
    def by(way):
        folder = tmp_path_factory.mktemp("install")
        environment = Environment(folder)
        if way == "wheel":
            environment.install(str(wheel))
        else:
            source = _copy_source(folder / "source")
            options = way.split()[2:-1]
            environment.install(*options, str(source))
        return environment

    return by


@pytest.fixture(scope="session")
def seen(install):
    """A function: what children saw of an install, once a way."""

    @lru_cache(maxsize=None)
    def by(way):
        more = {"dash_m": DASH_M, "broken": BROKEN} if way == "wheel" else {}
        return install(way).run_children(facts=FACTS, **more)

    return by


@pytest.fixture(params=WAYS)
def facts(request, install, seen):
    done, folder = seen(request.param)["facts"], install(request.param).folder
    assert done.returncode == 0, done.stderr
    assert "lavis-kvmod could not" not in done.stderr
    package = folder / "source" if request.param == "pip install -e ." else folder / "venv"
    return {**json.loads(done.stdout.splitlines()[-1]), "expected in": package}


@pytest.fixture(scope="session")
def environment(install):
    return install("wheel")


def test_lavis_lists_the_model_with_its_types(facts):
    assert facts["expected in"] in Path(facts["package"]).parents
    stock = {"pretrain_opt2.7b", "pretrain_opt6.7b", "caption_coco_opt2.7b", "caption_coco_opt6.7b"}
    assert set(facts["model types"]) == stock | {"demo"}


def test_our_model_needs_no_model_type_and_takes_one(facts):
    bare = facts["no model type"]
    assert "FileNotFoundError" in bare["types"]  # all it lacks are the weights
    assert "blip2_pretrained_opt2.7b.pth" in bare["text"]
    assert bare == facts["default model type"]
    assert "blip2_caption_opt6.7b.pth" in facts["another model type"]["text"]


def test_stock_models_still_demand_theirs(facts):
    assert "TypeError" in facts["stock model"]["types"]
    assert "model_type" in facts["stock model"]["text"]


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_the_commands_answer(facts, command):
    assert "usage:" in facts[command]
    assert "--cfg-path" in facts[command]


@pytest.mark.parametrize("file", ["model config", "run file"])
def test_config_files_are_part_of_the_install(facts, file):
    assert facts["expected in"] in Path(facts[file]).parents


def test_python_dash_m_reaches_our_command(seen):
    done = seen("wheel")["dash_m"]
    assert done.returncode == 0, done.stderr
    assert "--cfg-path" in done.stdout


@pytest.mark.slow
def test_the_console_script_answers(environment):
    assert environment.run("lavis-kvmod", "--version").stdout.startswith("lavis-kvmod ")
    assert "demo" in environment.run("lavis-kvmod", "--help").stdout
    disabled = environment.run("lavis-kvmod", "demo", LAVIS_KVMOD_DISABLE="1")
    assert disabled.returncode == 2
    assert "unset LAVIS_KVMOD_DISABLE" in disabled.stderr


@pytest.mark.slow
def test_disabled_means_stock_lavis(environment):
    code = """
import importlib.util, sys
from lavis.models import load_model, model_zoo
print("blip2_opt_kvmod" in dict(model_zoo), importlib.util.find_spec("lavis.train"))
print(load_model.__module__, hasattr(load_model, "__wrapped__"))
print("lavis_kvmod.plugin" in sys.modules)
"""
    done = environment.run("python", "-c", code, LAVIS_KVMOD_DISABLE="1")
    assert done.stdout.splitlines() == ["False None", "lavis.models False", "False"], done.stderr


def test_a_plugin_that_cannot_be_imported_is_one_warning(seen):
    done = seen("wheel")["broken"]
    assert done.stdout.split() == ["True", "False"], done.stderr
    assert done.stderr.count("lavis-kvmod could not be activated") == 1
    assert "import of lavis_kvmod.tasks.vqa halted" in done.stderr
    assert "LAVIS_KVMOD_DISABLE=1" in done.stderr


@pytest.mark.parametrize("way", WAYS)
def test_uninstalling_leaves_nothing(install, tmp_path, way):
    environment = Environment(shutil.copytree(install(way).folder, tmp_path / "copy", symlinks=True))
    installed = sorted(path.name for path in environment.site_packages.iterdir())
    assert "lavis_kvmod.pth" in installed
    finders = ("python", "-c", "import sys; print('lavis_kvmod._hook' in sys.modules)")
    assert environment.run(*finders).stdout.strip() == "True"
    if way != "wheel":
        left = {path.name for path in (environment.folder / "source").iterdir()}
        assert left <= {*PACKAGED, *PACKAGED_FOLDERS, "build", "lavis_kvmod.egg-info"}

    environment.pip("uninstall", "--yes", "lavis-kvmod")
    assert [path.name for path in environment.site_packages.iterdir()] == ["dependencies.pth"]
    assert not (environment.bin / "lavis-kvmod").exists()
    after = environment.run(*finders)
    assert (after.stdout.strip(), after.stderr) == ("False", "")
