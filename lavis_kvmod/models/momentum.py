"""ALBEF's momentum model and its queue: slowly following weights that give steadier targets, and features of the last
batches to be compared with (arXiv 2107.07651, section 3.3; MoCo, arXiv 1911.05722).
"""

import copy
from typing import Dict, Mapping, NamedTuple

import torch
from torch import Tensor, nn

from lavis_kvmod.models.objectives import Identity


class QueuedFeatures(NamedTuple):
    """What the queue holds: image features (k, q, e), text features (k, e), and what they are of."""

    image: Tensor
    text: Tensor
    identity: Identity


class FeatureQueue(nn.Module):
    """The features of the last ``size`` samples of all ranks, in a ring. They are buffers: a checkpoint holds them.

    Args:
        size: samples kept.
        num_queries, width: of an image's features (q, e); a text's are (e,).
    """

    image_features: Tensor
    text_features: Tensor
    image_ids: Tensor
    text_ids: Tensor
    count: Tensor

    def __init__(self, size: int, num_queries: int, width: int):
        super().__init__()
        self.register_buffer("image_features", torch.zeros(size, num_queries, width))
        self.register_buffer("text_features", torch.zeros(size, width))
        self.register_buffer("image_ids", torch.zeros(size, dtype=torch.long))
        self.register_buffer("text_ids", torch.zeros(size, dtype=torch.long))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))  # of all that ever came

    def contents(self) -> QueuedFeatures:
        """What has come so far, at most ``size`` samples."""
        k = min(int(self.count), len(self.text_features))
        identity = Identity(self.image_ids[:k], self.text_ids[:k])
        # Copies: a loss is computed with what stands here now, and its gradient after others have come.
        return QueuedFeatures(self.image_features[:k].clone(), self.text_features[:k].clone(), identity)

    @torch.no_grad()
    def push(self, image_features: Tensor, text_features: Tensor, identity: Identity) -> None:
        """Add the samples of all ranks, (B, q, e) and (B, e); the oldest make room."""
        size = len(self.text_features)
        rows = slice(max(len(text_features) - size, 0), None)
        came = torch.arange(len(text_features), device=self.count.device)[rows]
        places = (self.count + came) % size
        self.image_features[places] = image_features[rows].to(self.image_features.dtype)
        self.text_features[places] = text_features[rows].to(self.text_features.dtype)
        self.image_ids[places] = identity.image[rows]
        self.text_ids[places] = identity.text[rows]
        self.count += len(text_features)


class MomentumWeights(nn.Module):
    """Copies of parts of a model that follow them: m <- rate · m + (1 - rate) · trained. Frozen, and saved.

    Args:
        parts: the parts by name; modules, parameters, or None for what the model is without.
        rate: how much of itself a copy keeps at each step.
    """

    def __init__(self, parts: Mapping[str, object], rate: float):
        super().__init__()
        self.rate = rate
        for name, part in parts.items():
            setattr(self, name, copy.deepcopy(part))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "MomentumWeights":
        """Stay in eval mode: targets are not to be dropped out."""
        return super().train(False)

    @torch.no_grad()
    def follow(self, parts: Mapping[str, object]) -> None:
        """Take a step towards the parts as they are now."""
        trained = _parameters(parts)
        own = dict(self.named_parameters())
        mine, theirs = zip(*((own[name], trained[name]) for name in own))
        torch._foreach_lerp_(list(mine), [value.detach() for value in theirs], 1 - self.rate)

    @torch.no_grad()
    def copy_from(self, parts: Mapping[str, object]) -> None:
        """Be equal to the parts, as at the start of a training."""
        trained = _parameters(parts)
        for name, parameter in self.named_parameters():
            parameter.copy_(trained[name])


def _parameters(parts: Mapping[str, object]) -> Dict[str, nn.Parameter]:
    found: Dict[str, nn.Parameter] = {}
    for name, part in parts.items():
        if isinstance(part, nn.Parameter):
            found[name] = part
        elif isinstance(part, nn.Module):
            found.update({f"{name}.{inner}": value for inner, value in part.named_parameters()})
    return found
