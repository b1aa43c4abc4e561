"""A frozen classification network as the second encoder of an image."""

from dataclasses import dataclass
from typing import Optional, Sequence

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
    """A classification network without its classifier: (b, 3, H, W) -> (b, feature_dim[, 1, 1])."""

    module: nn.Module
    feature_dim: int
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD


class AuxiliaryEncoder(nn.Module):
    """A frozen image classifier's pooled features of an image that BLIP's processor has normalised.

    It undoes BLIP's normalisation, applies the backbone's own, resizes if asked to, and pools. It has no trainable
    parameter, never leaves eval mode (BatchNorm statistics stay as they were trained) and builds no graph.

    Args:
        backbone: network, feature width and normalisation.
        image_size: side in pixels the image is resized to (bilinear); None takes it as given.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, backbone: Backbone, image_size: Optional[int] = None):
        super().__init__()
        self.backbone = backbone.module
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

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """BLIP-normalised image (b, 3, H, W) -> pooled features (b, feature_dim), float32."""
        image = self.renormalise(image)
        if self.image_size is not None and image.shape[-2:] != (self.image_size,) * 2:
            image = F.interpolate(image, size=(self.image_size,) * 2, mode="bilinear", align_corners=False)
        network = self._folded(self.backbone)
        if network is not self.backbone:
            image = image.contiguous(memory_format=torch.channels_last)
        return network(image).flatten(1).float()

    def renormalise(self, image: Tensor) -> Tensor:
        """From BLIP's normalisation to the backbone's: (b, 3, H, W) -> the same shape."""
        return image * self.scale + self.shift
