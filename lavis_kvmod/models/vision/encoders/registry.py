"""The image encoders by name, and how to add one."""

import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Optional

from torch import nn

from lavis_kvmod.system.registry import Registry

# (image_size, drop_path_rate, **geometry) -> the ViT
BuildVision = Callable[..., nn.Module]
BLIP2_FILES = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2"


@dataclass(frozen=True)
class VisionEncoder:
    """How one ``vit_model`` is built and where its weights are: see `register_image_encoder`."""

    build: BuildVision
    blocks: Callable[[Any], Iterable[nn.Module]] = operator.attrgetter("blocks")
    url: Optional[str] = None
    build_weights: Optional[Callable[[], Path]] = None


VISION_ENCODERS: Registry[VisionEncoder] = Registry("image encoder", "vit_model")


def register_image_encoder(
    name: str,
    *,
    url: Optional[str] = None,
    blocks: Callable[[Any], Iterable[nn.Module]] = operator.attrgetter("blocks"),
    build_weights: Optional[Callable[[], Path]] = None,
) -> Callable[[BuildVision], BuildVision]:
    """Add an image encoder: a decorator for the function that builds it.

        @register_image_encoder("my-vit", url="https://…/my_vit.pth")
        def my_vit(image_size: int, drop_path_rate: float, **geometry) -> nn.Module:
            …

    The function gives a module (b, 3, H, H) -> (b, n, width), whose attribute ``num_features`` is the width;
    ``geometry`` is the run file's ``vit_geometry``. It is built without memory for its weights, which then are loaded
    under its own names. A method ``interpolate_positions(state)`` may bring the position embedding in a state dict to
    the module's image size.

    Args:
        name: what ``vit_model`` says.
        url: path or URL of the weights; without, ``vit_checkpoint`` has to name a file.
        blocks: gives the module's blocks, for ``use_grad_checkpoint``.
        build_weights: makes the file of weights on this machine, in place of a ``url``.

    Raises:
        ValueError: if the name is taken, listing what there is.
    """

    def register(build: BuildVision) -> BuildVision:
        VISION_ENCODERS.register(name, VisionEncoder(build, blocks, url, build_weights))
        return build

    return register
