"""The command line: ``lavis-kvmod COMMAND``, for everything LAVIS has no name for."""

import argparse
import sys
from importlib import import_module
from typing import Optional, Sequence

from lavis_kvmod import __version__, disabled
from lavis_kvmod.system.quiet import hide_deprecations

# command -> (module with `add_arguments(parser)` and `main(args)`, what it does)
_COMMANDS = {
    "doctor": ("lavis_kvmod.commands.doctor", "what is installed and missing, and whether a run fits this machine"),
    "settings": ("lavis_kvmod.commands.settings", "every key of a run file: default, what it may be, meaning"),
    "list": ("lavis_kvmod.commands.list", "what a run file can name: models, encoders, tasks, data sets, run files"),
    "params": ("lavis_kvmod.commands.params", "count a model's parameters and bytes by part, without loading it"),
    "memory": ("lavis_kvmod.commands.memory", "the GPU memory a run takes, by batch size, computed without a GPU"),
    "convert": ("lavis_kvmod.commands.convert", "write a checkpoint in another layout: LAVIS's or Hugging Face's"),
    "cache-features": (
        "lavis_kvmod.commands.cache_features",
        "write what the frozen encoders say of a run's images, for all its trainings to read",
    ),
    "pack": ("lavis_kvmod.commands.pack", "write a run file's data as tar shards (webdataset), or an index for shards"),
    "attend": ("lavis_kvmod.commands.attend", "where the model looks when it answers about an image, as a PNG"),
    "report": ("lavis_kvmod.commands.report", "a run on one page (report.html), or several compared"),
    "card": ("lavis_kvmod.commands.card", "a model card of a run, as Hugging Face has them"),
    "embed": ("lavis_kvmod.commands.embed", "write features of a split's images and texts, by a stage-1 model"),
    "capfilt": ("lavis_kvmod.commands.capfilt", "keep what fits of noisy texts, and of those a captioner writes"),
    "search": ("lavis_kvmod.commands.search", "find images for a text among such features"),
    "ablate": ("lavis_kvmod.commands.ablate", "train every arm of a study with several seeds, and compare them"),
    "app": ("lavis_kvmod.commands.app", "ask a model about pictures, on a page in the browser (this machine only)"),
    "demo": (
        "lavis_kvmod.commands.demo",
        "train on scanned digits with and without KV modulation, and compare (CPU, minutes)",
    ),
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one command, and return its exit status."""
    given = sys.argv[1:] if argv is None else list(argv)
    hide_deprecations()
    parser = argparse.ArgumentParser(
        prog="lavis-kvmod",
        description="KV modulation for LAVIS. Training and evaluation are LAVIS's commands: "
        "python -m lavis.train, python -m lavis.evaluate.",
    )
    parser.add_argument("--version", action="version", version=f"lavis-kvmod {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for name, (module_name, text) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if given[:1] == [name]:  # a command's module is imported only to be run or to be explained
            if disabled() and name != "doctor":
                parser.error("this command needs the plugin: unset LAVIS_KVMOD_DISABLE")
            module = import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(run=module.main)
    args = parser.parse_args(given)
    return args.run(args) or 0
