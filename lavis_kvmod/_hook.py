"""The post-import hook: activates the plugin as soon as LAVIS has been imported.

LAVIS has no plugin mechanism, so ``lavis_kvmod.pth`` imports this file at every start of the
interpreter. It puts one finder at the front of ``sys.meta_path`` and does nothing heavier, because
every Python process pays for it. The finder does two things:

* once ``lavis`` has been imported, it calls :func:`lavis_kvmod.plugin.activate`. A failure there
  becomes one warning and LAVIS goes on working; an error inside LAVIS is left as it is;
* it answers for ``lavis.train`` and ``lavis.evaluate`` where LAVIS has no such modules, so that
  ``python -m lavis.train`` works from any folder, under torchrun and in spawned workers too.

``LAVIS_KVMOD_DISABLE=1`` turns all of it off.
"""

import os
import sys

from lavis_kvmod import OFF, disabled

# As in __init__.py: `typing` is not imported at every start.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any, Optional, Set

_COMMANDS = {"lavis.train": "commands/train.py", "lavis.evaluate": "commands/evaluate.py"}


def install() -> None:
    """Put the finder in front of the others, once."""
    present = any(type(finder).__name__ == _LavisFinder.__name__ for finder in sys.meta_path)
    if not present and not disabled():
        sys.meta_path.insert(0, _LavisFinder())


class _LavisFinder:
    """Finds modules through the other finders, and watches those after which we have work to do."""

    def __init__(self) -> None:
        self._asking: Set[str] = set()  # names being looked up, in case another finder asks all finders too
        self._depth = 0  # watched modules that are being executed at this moment
        self._due = False  # LAVIS has been imported, and the plugin has not been activated since

    def find_spec(self, name: str, path: "Any" = None, target: "Any" = None) -> "Optional[ModuleSpec]":
        if name in _COMMANDS:
            if self._find_elsewhere(name, path, target) is not None:
                return None  # LAVIS has the module itself
            return _command_spec(name)
        if name == "lavis" or name.startswith("lavis_kvmod."):
            spec = self._find_elsewhere(name, path, target)
            # A folder that only happens to be called `lavis` has no code whose end we could await.
            if spec is not None and hasattr(spec.loader, "exec_module"):
                spec.loader = _WatchedLoader(spec.loader, self)  # type: ignore[assignment]
            return spec
        return None

    def _find_elsewhere(self, name: str, path: "Any", target: "Any") -> "Optional[ModuleSpec]":
        if name in self._asking:
            return None
        self._asking.add(name)
        try:
            for finder in list(sys.meta_path):
                if finder is not self and hasattr(finder, "find_spec"):
                    spec = finder.find_spec(name, path, target)
                    if spec is not None:
                        return spec
            return None
        finally:
            self._asking.discard(name)

    def execute(self, loader: "Any", module: "ModuleType") -> None:
        """Run `module` through its own `loader`, then activate the plugin if it is time.

        Our modules are watched too because they import LAVIS: activating halfway through, say,
        ``lavis_kvmod.tasks.vqa`` would meet that module half-made, so it waits until the
        outermost one is whole.
        """
        import gc

        self._depth += 1
        _wait_asleep()
        if module.__name__ == "lavis":
            _keep_from_tilde()
        # Thousands of modules are read, and nothing of them is garbage: a collector that looks through all there is
        # again and again takes a twentieth of the time.
        collects = gc.isenabled()
        gc.disable()
        try:
            loader.exec_module(module)
            self._due = self._due or module.__name__ == "lavis"
        finally:
            self._depth -= 1
            if self._due and self._depth == 0:
                self._due = False
                _activate()
            if collects:
                gc.enable()


class _WatchedLoader:
    """Stands in for a module's own loader until the module is executed."""

    def __init__(self, loader: "Any", finder: _LavisFinder) -> None:
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name: str) -> "Any":
        return getattr(object.__getattribute__(self, "_loader"), name)

    def create_module(self, spec: "ModuleSpec") -> "Optional[ModuleType]":
        return self._loader.create_module(spec)

    def exec_module(self, module: "ModuleType") -> None:
        module.__loader__ = module.__spec__.loader = self._loader  # type: ignore[union-attr]
        self._finder.execute(self._loader, module)


def _command_spec(name: str) -> "Optional[ModuleSpec]":
    from importlib.util import spec_from_file_location

    return spec_from_file_location(name, os.path.join(os.path.dirname(__file__), _COMMANDS[name]))


def _wait_asleep() -> None:
    """Have PyTorch's threads sleep while they wait for each other, unless the user has said how they are to wait.

    They are made to turn in a circle instead, which is fine as long as each has a core of its own. Beside another busy
    process the one that is waited for does not run, while the waiting one burns what it could run on. Read when PyTorch
    is imported.
    """
    if "torch" not in sys.modules and not any(
        map(os.environ.get, ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"))
    ):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def _keep_from_tilde() -> None:
    """Where ``~`` stands for no folder (no HOME, a user id without a name) transformers, which LAVIS imports, makes one
    that is called so."""
    if os.path.expanduser("~") == "~" and not any(map(os.environ.get, ("HF_HOME", "TRANSFORMERS_CACHE"))):
        import tempfile

        mine = f"lavis_kvmod-{getattr(os, 'getuid', int)()}"
        os.environ["TRANSFORMERS_CACHE"] = os.path.join(tempfile.gettempdir(), mine)


def _activate() -> None:
    try:
        from lavis_kvmod.plugin import activate

        activate()
    except Exception as error:
        import warnings

        message = (
            f"lavis-kvmod could not be activated, LAVIS goes on without it: "
            f"{type(error).__name__}: {error}. "
            f"Reinstall lavis-kvmod, or turn it off with {OFF}=1."
        )
        try:
            # Up past execute, exec_module and the import system, to the line that imports LAVIS.
            warnings.warn(message, RuntimeWarning, stacklevel=4)
        except RuntimeWarning:  # under `-W error` too LAVIS must remain importable
            sys.stderr.write(f"{message}\n")


install()
