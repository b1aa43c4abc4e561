"""KV modulation for Salesforce LAVIS: BLIP-2 OPT with a second vision encoder.

This file runs at every start of the interpreter, through ``lavis_kvmod.pth``. It therefore imports
nothing heavy: the public names are loaded when they are first asked for (PEP 562).
"""

import os

OFF = "LAVIS_KVMOD_DISABLE"

# To type checkers what `typing.TYPE_CHECKING` is, without importing `typing` at every start.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from lavis_kvmod._version import __version__
    from lavis_kvmod.models.blip2_opt_kvmod import Blip2OPTKVMod
    from lavis_kvmod.models.connectors.kv_prefix import KVPrefixGenerator
    from lavis_kvmod.models.connectors.registry import register_connector
    from lavis_kvmod.models.vision.auxiliary import Backbone, register_auxiliary_encoder
    from lavis_kvmod.models.vision.encoders import register_image_encoder

__all__ = [
    "Backbone",
    "Blip2OPTKVMod",
    "KVPrefixGenerator",
    "__version__",
    "register_auxiliary_encoder",
    "register_connector",
    "register_image_encoder",
]

_LAZY = {
    "Backbone": "lavis_kvmod.models.vision.auxiliary",
    "Blip2OPTKVMod": "lavis_kvmod.models.blip2_opt_kvmod",
    "KVPrefixGenerator": "lavis_kvmod.models.connectors.kv_prefix",
    "__version__": "lavis_kvmod._version",
    "register_auxiliary_encoder": "lavis_kvmod.models.vision.auxiliary",
    "register_connector": "lavis_kvmod.models.connectors.registry",
    "register_image_encoder": "lavis_kvmod.models.vision.encoders",
}


def disabled() -> bool:
    """Whether the user has turned the plugin off through the environment."""
    return os.environ.get(OFF, "").strip().lower() not in ("", "0", "false", "no", "off")


def __getattr__(name: str) -> object:
    """Import a public name when it is first used."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value


def __dir__() -> "list[str]":
    return sorted(set(globals()) | set(_LAZY))
