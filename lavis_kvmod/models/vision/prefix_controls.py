"""What the prefix is made from instead of the image's own features: controls that tell where a gain comes from.

=============  ========================================================================================================
``none``       the image's own auxiliary features: the model as it is meant
``constant``   the same numbers for every image: a learned constant prefix (prefix-tuning), parameters and nothing else
``shuffled``   those of another image of the batch: the right distribution, the wrong content
``untrained``  those of an encoder with random weights (`lavis_kvmod.models.vision.auxiliary.untrained_encoder`)
``vit``        the mean of the ViT's own tokens: the same way, without new information
=============  ========================================================================================================

All have the same trained parameters. Swapping at test time alone tells whether a trained model uses its prefix.
"""

import torch
from torch import Tensor

from lavis_kvmod.models.vision.feature_cache import FrozenFeatures

__all__ = ["PREFIX_CONTROLS", "controlled"]

PREFIX_CONTROLS = ("none", "constant", "shuffled", "untrained", "vit")


def controlled(control: str, features: FrozenFeatures, swap: bool = False, each: int = 1) -> FrozenFeatures:
    """Features whose ``pooled`` (b, …, f) are replaced by the control's, of the same shape; with ``swap`` each image
    has what another one would have.

    Another image is the one before in the batch, where each image is there once (``run.group_by_image``), or with
    ``each`` images a sample that of the sample before; a batch of one image keeps its own.

    Raises:
        ValueError: for an unknown control.
    """
    if control not in PREFIX_CONTROLS:
        raise ValueError(f"prefix_control: expected one of {', '.join(PREFIX_CONTROLS)}; got {control!r}")
    pooled = features.pooled
    if pooled is None:
        return features
    if control == "constant":
        pooled = torch.ones_like(pooled)
    elif control == "vit":
        pooled = _as_wide(features.visual_tokens.mean(1), pooled)
    elif control == "shuffled":
        pooled = pooled.roll(each, dims=0)
    return features._replace(pooled=pooled.roll(each, dims=0) if swap else pooled)


def _as_wide(mean: Tensor, like: Tensor) -> Tensor:
    """Mean tokens (b, width), repeated until they fill the features' width, in the shape of ``like`` (b, …, f)."""
    width = like.shape[-1]
    filled = mean.to(like.dtype).repeat(1, -(-width // mean.shape[1]))[:, :width]
    return filled.view(len(filled), *[1] * (like.ndim - 2), width).expand_as(like)
