"""The second encoder's features as tokens of their own, for connectors that attend to nothing.

    pooled features ─► Linear ─► [ k vectors | vectors of the visual tokens ] ─► language model

As LLaVA brings visual tokens to the language model (arXiv 2304.08485): by one projection.
"""

from torch import Tensor, nn


class AuxTokens(nn.Module):
    """Pooled features to vectors of the soft prompt.

    Args:
        feature_dim: width of the auxiliary encoder's features.
        output_width: of the language model.
        num_tokens: vectors.
    """

    def __init__(self, *, feature_dim: int, output_width: int, num_tokens: int = 1):
        super().__init__()
        self.num_tokens = num_tokens
        self.proj = nn.Linear(feature_dim, num_tokens * output_width)

    def forward(self, features: Tensor) -> Tensor:
        """Pooled features (b, feature_dim) -> (b, k, output width)."""
        return self.proj(features).unflatten(-1, (self.num_tokens, -1))
