"""The post-import hook, in fresh interpreters with a stand-in for LAVIS, so that each is quick."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What site.py does with `lavis_kvmod.pth` when the interpreter starts.
START = f"""
import os, sys
sys.path.append({str(ROOT)!r})
exec(open({str(ROOT / "lavis_kvmod.pth")!r}).read())
def finders():
    return [f for f in sys.meta_path if type(f).__module__ == "lavis_kvmod._hook"]
"""
# Puts a recorder in the place of activation, so that a test sees when it happens.
RECORD = """
import lavis_kvmod.plugin as plugin
calls = []
plugin.activate = lambda: calls.append(getattr(sys.modules["lavis"], "ready", False))
"""


@pytest.fixture
def python(tmp_path):
    """Runs code after the hook in a fresh interpreter, without site-packages; gives its stdout."""

    def run(code, *options, start=START, **env):
        own = {k: v for k, v in os.environ.items() if not k.startswith(("LAVIS_", "PYTHON"))}
        done = subprocess.run(
            [sys.executable, "-S", *options, "-c", start + code],
            cwd=tmp_path,
            env={**own, "PYTHONDONTWRITEBYTECODE": "1", **env},
            capture_output=True,
            text=True,
        )
        run.stderr = done.stderr
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


@pytest.fixture
def lavis(tmp_path):
    """Writes a package called `lavis` into the folder where `python` runs."""

    def write(code="ready = True\n", **modules):
        for name, text in {"__init__": code, **modules}.items():
            file = tmp_path / "lavis" / f"{name}.py"
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)

    return write


def test_start_up_imports_the_hook_and_nothing_else(python):
    code = "print(*sorted(set(sys.modules) - before))"
    loaded = python(code, start="import os, sys; before = set(sys.modules)\n" + START)
    assert loaded.split() == ["lavis_kvmod", "lavis_kvmod._hook"]


def test_the_finder_is_installed_once(python):
    again = "exec(open(os.path.join(sys.path[-1], 'lavis_kvmod.pth')).read());"
    forget = "[sys.modules.pop(n) for n in list(sys.modules) if n.startswith('lavis_kvmod')];"
    assert python(again + forget + again + "print(len(finders()), sys.meta_path[0] in finders())")
    assert python(again + forget + again + "print(len(finders()))") == "1"


@pytest.mark.parametrize("value, expected", [("1", 0), ("true", 0), ("yes", 0), ("0", 1), ("", 1)])
def test_the_environment_turns_it_off(python, value, expected):
    assert python("print(len(finders()))", LAVIS_KVMOD_DISABLE=value) == str(expected)


def test_activation_comes_once_and_after_lavis_is_whole(python, lavis):
    lavis()
    code = "import lavis; import lavis; import lavis_kvmod.system.paths; print(calls)"
    assert python(RECORD + code) == "[True]"


def test_lavis_keeps_its_own_loader(python, lavis):
    lavis()
    code = "import lavis; print(type(lavis.__loader__).__name__, type(lavis.__spec__.loader).__name__)"
    assert python(RECORD + code) == "SourceFileLoader SourceFileLoader"


def test_activation_waits_for_a_module_of_ours_that_imports_lavis(python, lavis, tmp_path):
    lavis()
    (tmp_path / "probe.py").write_text("import lavis\nwhole = True\n")
    code = """
import lavis_kvmod
lavis_kvmod.__path__.append(os.getcwd())
def activate():
    from lavis_kvmod.probe import whole
    calls.append(whole)
plugin.activate = activate
import lavis_kvmod.probe
print(calls)
"""
    assert python(RECORD + code) == "[True]"


def test_an_error_in_lavis_is_left_as_it_is(python, lavis):
    lavis("raise RuntimeError('of its own')\n")
    code = """
import warnings
warnings.simplefilter("error")
try:
    import lavis
except RuntimeError as error:
    print(error, error.__cause__, calls, "lavis" in sys.modules)
"""
    assert python(RECORD + code) == "of its own None [] False"


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("ends", ["", "raise RuntimeError"])
def test_nothing_is_collected_while_lavis_is_imported(python, lavis, before, ends):
    lavis(f"import gc\ngc.seen = gc.isenabled()\n{ends}\n")
    code = f"""
import contextlib, gc
if not {before}:
    gc.disable()
with contextlib.suppress(RuntimeError):
    import lavis
print(gc.seen, gc.isenabled())
"""
    assert python(RECORD + code) == f"False {before}"


def test_without_lavis_nothing_happens(python):
    code = """
try:
    import lavis
except ModuleNotFoundError as error:
    print(error, calls)
"""
    assert python(RECORD + code) == "No module named 'lavis' []"


FAILING = RECORD + "\ndef activate():\n    raise LookupError('no such thing')\nplugin.activate = activate\n"


def test_a_failing_plugin_is_one_warning(python, lavis):
    lavis()
    code = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import lavis
print(json.dumps([[str(w.message), w.category.__name__, w.filename] for w in caught]))
print(lavis.ready)
"""
    caught, ready = python(FAILING + code).splitlines()
    ((message, category, filename),) = json.loads(caught)
    assert "LookupError: no such thing" in message
    assert "LAVIS_KVMOD_DISABLE=1" in message
    assert category == "RuntimeWarning"
    assert filename == "<string>"  # the line that imports LAVIS, not one of ours
    assert ready == "True"


def test_a_failing_plugin_does_not_break_lavis_where_warnings_are_errors(python, lavis):
    lavis()
    assert python(FAILING + "import lavis; print(lavis.ready)", "-W", "error") == "True"
    assert "LookupError: no such thing" in python.stderr


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_commands_that_lavis_lacks_are_ours(python, lavis, command):
    lavis()
    code = f"import importlib.util; print(importlib.util.find_spec('lavis.{command}').origin)"
    assert Path(python(RECORD + code)) == ROOT / "lavis_kvmod" / "commands" / f"{command}.py"


def test_commands_that_lavis_has_are_its_own(python, lavis, tmp_path):
    lavis(train="print('its own')\n")
    code = "import runpy; runpy.run_module('lavis.train', run_name='__main__')"
    assert python(RECORD + code) == "its own"


def test_other_finders_that_ask_all_finders_are_no_trouble(python, lavis):
    lavis()
    code = """
class Asking:
    def find_spec(self, name, path=None, target=None):
        for finder in sys.meta_path:
            if finder is not self:
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    return spec
sys.meta_path.insert(0, Asking())
sys.meta_path.append(sys.meta_path[0])
import lavis
print(calls)
"""
    assert python(RECORD + code) == "[True]"


def test_a_hook_without_its_package_is_silent(python, tmp_path):
    (tmp_path / "site").mkdir()
    hook = (ROOT / "lavis_kvmod.pth").read_text()
    (tmp_path / "site" / "lavis_kvmod.pth").write_text(hook)
    code = "import site, sys; site.addsitedir('site'); print('lavis_kvmod' in sys.modules)"
    assert python(code, start="") == "False"
    assert python.stderr == ""


def test_no_folder_is_called_tilde(tmp_path, lavis):
    """A container's user id without a name, and no HOME: transformers would write its version into ``~``."""
    lavis(code="import transformers.utils.hub")
    nameless = (
        "import os; os.path.expanduser = lambda path: path; "
        "import lavis_kvmod.plugin as plugin; plugin.activate = lambda: None; import lavis"
    )
    env = {name: value for name, value in os.environ.items() if name not in ("HOME", "HF_HOME", "TRANSFORMERS_CACHE")}
    env.update(TMPDIR=str(tmp_path / "tmp"), PYTHONPATH=str(tmp_path))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "here").mkdir()
    subprocess.run([sys.executable, "-c", nameless], cwd=tmp_path / "here", env=env, check=True, timeout=120)
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize("env", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "9"}])
def test_threads_sleep_while_they_wait_unless_the_user_says_how(python, lavis, monkeypatch, env):
    """Set before PyTorch, which reads it, is imported; a process that does not import LAVIS is left alone."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    lavis()
    code = "said = lambda: os.environ.get('OMP_WAIT_POLICY')\nbefore = said()\nimport lavis\nprint(before, said())"
    before = env.get("OMP_WAIT_POLICY")
    assert python(code, "-W", "ignore", **env) == f"{before} {before if env else 'PASSIVE'}"
    assert python(f"sys.modules['torch'] = os\n{code}", "-W", "ignore", **env) == f"{before} {before}"
