"""A frozen classification network as the second encoder of an image."""

from dataclasses import dataclass
from typing import List, Optional, Sequence, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_kvmod.models.vision.auxiliary.folded import Folded

# BLIP's image processors (lavis/processors/blip_processors.py) normalise with CLIP's statistics …
BLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
BLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# … and EfficientNet was trained with ImageNet's.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Backbone:
    """A classification network without its classifier: (b, 3, H, W) -> (b, feature_dim[, 1, 1]).

    ``feature_map`` names its method for the last map before pooling, (b, 3, H, W) -> (b, feature_dim, h, w); None where
    it has none, and so no ``prefix_source: grid``.
    """

    module: nn.Module
    feature_dim: int
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    feature_map: Optional[str] = None

    def map_of(self, network: nn.Module, image: Tensor) -> Tensor:
        """The last map (b, feature_dim, h, w) of this network, or of a copy of it.

        Raises:
            ValueError: if it has none.
        """
        found = getattr(network, self.feature_map)(image) if self.feature_map else None
        if found is None or found.ndim != 4:
            raise ValueError(
                "expected an auxiliary encoder with a last map, for prefix_source: grid; this one has none"
            )
        return found


class AuxiliaryEncoder(nn.Module):
    """A frozen image classifier's features of an image that BLIP's processor has normalised: pooled, or its last map.

    It undoes BLIP's normalisation, applies the backbone's own, resizes if asked to, and pools. It has no trainable
    parameter, never leaves eval mode (BatchNorm statistics stay as they were trained) and builds no graph.

    Args:
        backbone: network, feature width and normalisation.
        image_size: side in pixels the image is resized to (bilinear); None takes it as given.
        grid: pool the last map to a grid of so many rows and columns; None pools all of it to one vector.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, backbone: Backbone, image_size: Optional[int] = None, grid: Optional[int] = None):
        super().__init__()
        self.backbone = backbone.module
        self._map_of = backbone.map_of
        self.grid = grid
        self._folded = Folded()
        self.feature_dim = backbone.feature_dim
        self.image_size = image_size
        # (x * BLIP_STD + BLIP_MEAN - mean) / std as one multiply-add; constants, so not part of the state dict.
        blip_mean, blip_std = torch.tensor(BLIP_MEAN), torch.tensor(BLIP_STD)
        mean, std = torch.tensor(backbone.mean), torch.tensor(backbone.std)
        self.register_buffer("scale", (blip_std / std).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", ((blip_mean - mean) / std).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "AuxiliaryEncoder":
        """Stay in eval mode whatever ``mode`` says: this encoder is frozen."""
        return super().train(False)

    @property
    def members(self) -> "List[AuxiliaryEncoder]":
        """The encoders that this is made of: itself."""
        return [self]

    @property
    def form(self) -> str:
        """What its features depend on beside weights and pixels, for a fingerprint."""
        return f"{self.image_size}" + ("" if self.grid is None else f" grid {self.grid}")

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """BLIP-normalised image (b, 3, H, W) -> features, float32: (b, feature_dim), or those of a grid, row by row,
        (b, k * k, feature_dim).

        Raises:
            ValueError: for a grid that is larger than the map, or of a network without one.
        """
        image = self.renormalise(image)
        if self.image_size is not None and image.shape[-2:] != (self.image_size,) * 2:
            image = F.interpolate(image, size=(self.image_size,) * 2, mode="bilinear", align_corners=False)
        network = self._folded(self.backbone)
        if network is not self.backbone:
            image = image.contiguous(memory_format=torch.channels_last)
        if self.grid is None:
            return network(image).flatten(1).float()
        last = self._map_of(network, image).float()
        if self.grid > min(last.shape[-2:]):
            raise ValueError(
                f"prefix_grid: expected at most {min(last.shape[-2:])}, the last map's side, got {self.grid}"
            )
        return F.adaptive_avg_pool2d(last, self.grid).flatten(2).transpose(1, 2)

    def renormalise(self, image: Tensor) -> Tensor:
        """From BLIP's normalisation to the backbone's: (b, 3, H, W) -> the same shape."""
        return image * self.scale + self.shift


class AuxiliaryEncoders(nn.Module):
    """Several auxiliary encoders of the same image, whose features stand side by side, in this order.

    Args:
        encoders: two or more, all pooled or all with the same grid.
    """

    def __init__(self, encoders: Sequence[AuxiliaryEncoder]):
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.feature_dim = sum(encoder.feature_dim for encoder in encoders)

    def train(self, mode: bool = True) -> "AuxiliaryEncoders":
        """Stay in eval mode, as each of them does."""
        return super().train(False)

    @property
    def members(self) -> List[AuxiliaryEncoder]:
        """The encoders."""
        return list(self.encoders)  # type: ignore[arg-type]

    @property
    def form(self) -> str:
        """As `AuxiliaryEncoder.form`."""
        return " | ".join(encoder.form for encoder in self.members)

    def forward(self, image: Tensor) -> Tensor:
        """BLIP-normalised image (b, 3, H, W) -> features (b, …, sum of the feature widths), float32."""
        return torch.cat([encoder(image) for encoder in self.encoders], dim=-1)


Auxiliary = Union[AuxiliaryEncoder, AuxiliaryEncoders]


def side_by_side(encoders: Sequence[AuxiliaryEncoder]) -> Auxiliary:
    """One encoder as it is (and with the names it has in checkpoints), several together."""
    return encoders[0] if len(encoders) == 1 else AuxiliaryEncoders(encoders)
