"""Modules without memory: for counting parameters, and for loading weights without first making random ones."""

from contextlib import contextmanager
from typing import Any, Iterator, Optional

from torch import nn


@contextmanager
def empty_weights() -> Iterator[None]:
    """Parameters registered inside have shape and dtype but no storage (``meta`` device); buffers are real.

    `torch.device("meta")` would do the same for buffers too, but LAVIS's ViT computes numbers while it is built.
    """
    of_modules: Any = nn.Module
    register = of_modules.register_parameter

    def register_empty(module: nn.Module, name: str, param: Optional[nn.Parameter]) -> None:
        register(module, name, param)
        if param is not None and param.device.type != "meta":  # one that is already empty may be shared
            empty = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
            module._parameters[name] = empty

    of_modules.register_parameter = register_empty
    try:
        yield
    finally:
        of_modules.register_parameter = register
