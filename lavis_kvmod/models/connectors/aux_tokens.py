"""The second encoder's features as tokens of their own, where they are no prefix.

    pooled features ─► Linear ─► k vectors ─┬─► [ k | soft prompt ] ─► language model       ``tokens``
                                            ├─► [ k | visual tokens ] ─► Q-Former           ``visual_tokens``
                                            └─► query tokens + k ─► Q-Former                ``queries``

``tokens`` is for connectors that attend to nothing: as LLaVA brings visual tokens to the language model (arXiv
2304.08485), by one projection. The other two are what a prefix is to be compared with.
"""

from typing import Literal, Optional, TypeVar

import torch
from torch import Tensor, nn

Place = Literal["tokens", "visual_tokens", "queries"]
There = TypeVar("There", Tensor, Optional[Tensor])


class AuxTokens(nn.Module):
    """Pooled features to vectors of what they join.

    Args:
        feature_dim: width of the auxiliary encoder's features.
        output_width: of what they join: the language model's, the visual tokens' or the connector's.
        num_tokens: vectors; of ``queries``, 1 is added to all of them, else each gets its own.
        place: what they join.
    """

    def __init__(self, *, feature_dim: int, output_width: int, num_tokens: int = 1, place: Place = "tokens"):
        super().__init__()
        self.num_tokens = num_tokens
        self.place = place
        self.proj = nn.Linear(feature_dim, num_tokens * output_width)

    def forward(self, features: Tensor) -> Tensor:
        """Pooled features (b, feature_dim) -> (b, k, output width)."""
        return self.proj(features).unflatten(-1, (self.num_tokens, -1))

    def in_front_of(self, place: Place) -> int:
        """How many vectors stand in front of what is there."""
        return self.num_tokens if place == self.place != "queries" else 0


def joined(place: Place, there: There, aux_tokens: Optional[AuxTokens], features: Optional[Tensor]) -> There:
    """What is there, (b, n, width), with the second encoder's features, if this is their place."""
    if there is None or aux_tokens is None or features is None or aux_tokens.place != place:
        return there
    tokens = aux_tokens(features).to(there.dtype)
    return there + tokens if place == "queries" else torch.cat([tokens, there], dim=1)
