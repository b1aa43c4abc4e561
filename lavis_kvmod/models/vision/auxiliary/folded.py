"""A frozen EfficientNet as a CPU likes it best: the same function in half the time.

Each BatchNorm, whose statistics stay, goes into the convolution before it; so does padding where it is
even on both sides; swish is one operation in place; images lie channel by channel within a pixel (channels last).
"""

import copy
from typing import Any, Optional, Tuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils.fusion import fuse_conv_bn_weights

__all__ = ["Folded", "fold"]

# Of efficientnet_pytorch and efficientnet_lite_pytorch: convolution, and the norm behind it.
_PAIRS = (
    ("_conv_stem", "_bn0"),
    ("_expand_conv", "_bn0"),
    ("_depthwise_conv", "_bn1"),
    ("_conv_head", "_bn1"),
    ("_project_conv", "_bn2"),
)


def fold(network: nn.Module) -> Optional[nn.Module]:
    """A copy of a network in evaluation mode that computes the same to rounding; None for a network of another kind."""
    if not (hasattr(network, "_conv_stem") and hasattr(network, "_blocks")):
        return None
    folded = copy.deepcopy(network)
    for module in folded.modules():
        for conv, norm in _PAIRS:
            _fold_pair(module, conv, norm)
        if type(getattr(module, "_swish", None)).__name__ in ("SiLU", "Swish", "MemoryEfficientSwish"):
            module._swish = nn.SiLU(inplace=True)
    return folded.to(memory_format=torch.channels_last).requires_grad_(False)


def _fold_pair(module: Any, conv_name: str, norm_name: str) -> None:
    conv, norm = getattr(module, conv_name, None), getattr(module, norm_name, None)
    if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
        return
    learned: Any = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *learned)
    setattr(module, norm_name, nn.Identity())
    padding = getattr(conv, "static_padding", None)
    if isinstance(padding, nn.ZeroPad2d):
        left, right, top, bottom = padding.padding
        if left == right and top == bottom:
            conv.padding, conv.static_padding = (top, left), nn.Identity()


class Folded:
    """A network's folded copy, made when it is first asked for, and anew when the network's weights have changed."""

    def __init__(self) -> None:
        self._of: Optional[Tuple[Any, ...]] = None
        self._network: Optional[nn.Module] = None

    def __call__(self, network: nn.Module) -> nn.Module:
        """What to compute with: on a CPU the folded copy, if there is one, else the network itself."""
        first = next(network.parameters(), None)
        if first is None or first.device.type != "cpu" or isinstance(first, FakeTensor):
            return network
        tensors = [*network.parameters(), *network.buffers()]
        state = tuple((id(tensor), tensor._version, tensor.dtype) for tensor in tensors)
        if state != self._of:
            self._of, self._network = state, fold(network)
        return network if self._network is None else self._network
