"""KV modulation for Salesforce LAVIS: BLIP-2 OPT with a second vision encoder.

This file runs at every start of the interpreter, through ``lavis_kvmod.pth``. It therefore imports
nothing heavy: the public classes are loaded when they are first asked for (PEP 562).
"""

import os

from lavis_kvmod._version import __version__

OFF = "LAVIS_KVMOD_DISABLE"

# To type checkers what `typing.TYPE_CHECKING` is, without importing `typing` at every start.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from lavis_kvmod.models.blip2_opt_kvmod import Blip2OPTKVMod
    from lavis_kvmod.models.connectors.kv_prefix import KVPrefixGenerator

__all__ = ["Blip2OPTKVMod", "KVPrefixGenerator", "__version__"]

_LAZY = {
    "Blip2OPTKVMod": "lavis_kvmod.models.blip2_opt_kvmod",
    "KVPrefixGenerator": "lavis_kvmod.models.connectors.kv_prefix",
}


def disabled():
    """Whether the user has turned the plugin off through the environment."""
    return os.environ.get(OFF, "").strip().lower() not in ("", "0", "false", "no", "off")


def __getattr__(name):
    """Import a public class when it is first used."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value


def __dir__():
    return sorted(set(globals()) | set(_LAZY))
