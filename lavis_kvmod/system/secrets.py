"""A config as it may be written down: resolved, but for what it takes from the environment, which may be a token."""

import os
import re
from typing import Any, Collection

from omegaconf import OmegaConf

__all__ = ["without_secrets"]

_FROM_ENVIRONMENT = "oc.env"


def without_secrets(config: Any) -> Any:
    """``config`` (OmegaConf's) as plain values, with ``${oc.env:NAME}`` left as it stands, and so what refers to it."""
    names = re.findall(rf"\$\{{{re.escape(_FROM_ENVIRONMENT)}:\s*['\"]?(\w+)", OmegaConf.to_yaml(config))
    secrets = {os.environ[name] for name in names if os.environ.get(name)}
    return _merged(OmegaConf.to_container(config), OmegaConf.to_container(config, resolve=True), secrets)


def _merged(raw: Any, resolved: Any, secrets: Collection[str]) -> Any:
    if isinstance(raw, dict):
        return {key: _merged(value, resolved[key], secrets) for key, value in raw.items()}
    if isinstance(raw, list):
        return [_merged(*of_both, secrets) for of_both in zip(raw, resolved)]
    if not isinstance(raw, str) or "${" not in raw:
        return resolved
    is_secret = _FROM_ENVIRONMENT in raw or any(secret in str(resolved) for secret in secrets)
    return raw if is_secret else resolved
