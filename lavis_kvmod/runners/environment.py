"""What a run was started with: versions, git revisions, machine."""

import datetime
import os
import platform
import shlex
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, Optional

import torch

import lavis_kvmod

__all__ = ["environment", "git_revision"]

_PACKAGES = "salesforce-lavis torch torchvision transformers timm tokenizers numpy pillow omegaconf webdataset".split()


def environment(device: torch.device, world_size: int) -> Dict[str, Any]:
    """Plain values for environment.json."""
    versions: Dict[str, Optional[str]] = {"python": platform.python_version(), "lavis-kvmod": lavis_kvmod.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    versions["torch"] = torch.__version__  # with what it was built for
    versions["cuda"] = torch.version.cuda
    return {
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "processes": world_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "versions": versions,
        # of where the user stands, and of this package if it is run from a checkout
        "git": {"here": git_revision(Path.cwd()), "lavis-kvmod": git_revision(Path(lavis_kvmod.__file__).parent)},
    }


def git_revision(folder: Path) -> Optional[str]:
    """The commit of the git repository around ``folder``, with ``-dirty`` if tracked files were changed; None if there
    is none, or no git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
