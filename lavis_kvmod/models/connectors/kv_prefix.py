"""From the auxiliary encoder's pooled features to Keys and Values that the Q-Former attends to.

Prefix-tuning (arXiv 2101.00190) learns one Key/Value prefix for a task; here an image writes its own. The prefix is
handed on as an argument (`KVPrefix`), never stored on a module.
"""

from typing import List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KVPrefix(NamedTuple):
    """What one cross-attention layer gets: Keys and Values (b, h, p, d), and the layer's gate.

    ``gate`` is None for plain concatenation, or the *opened* gate tanh(g), one number per head (h,). ``dropped`` (b,)
    is true for the samples that go without their prefix; None drops none.
    """

    key: Tensor
    value: Tensor
    gate: Optional[Tensor] = None
    dropped: Optional[Tensor] = None


class KeyProjection(nn.Linear):
    """Projects to Keys, with a bias that may not count.

    Softmax does not see a bias that all its Keys share: it adds the same to every score of a query. The bias's
    gradient is then zero, but what comes out of the computation is rounding, of which AdamW makes whole steps: other
    ones with every machine, batch size and number of processes. ``bias_counts=False`` gives it the exact zero.
    """

    def forward(self, x: Tensor, bias_counts: bool = True) -> Tensor:
        """(…, in) -> (…, out)"""
        # Not left out: the Keys stay those of LAVIS, and DDP waits for the gradient of every trained parameter.
        bias = self.bias if bias_counts or self.bias is None else self.bias.detach() + 0 * self.bias
        return F.linear(x, self.weight, bias)


class KVPrefixGenerator(nn.Module):
    """Writes a Key/Value prefix from pooled image features.

    An MLP brings the features to the Q-Former's width; the result shifts a set of learnable prefix tokens, and two
    projections turn those into Keys and Values, split into heads (docs/architecture.md).

    Args:
        feature_dim: width of the auxiliary encoder's pooled features (1536 for EfficientNet-B3).
        hidden_size: width of the Q-Former.
        num_prefix_tokens: how many Key/Value positions are put in front of the visual tokens.
        num_heads: attention heads of the Q-Former; must divide ``hidden_size``.
        num_layers: None writes one prefix for all cross-attention layers; a number writes one for each, from
            projections of their own.

    Raises:
        ValueError: if a size is not positive or ``num_heads`` does not divide ``hidden_size``.
    """

    def __init__(
        self,
        feature_dim: int = 1536,
        hidden_size: int = 768,
        num_prefix_tokens: int = 8,
        num_heads: int = 12,
        num_layers: Optional[int] = None,
    ):
        super().__init__()
        if num_prefix_tokens < 1:
            raise ValueError(
                f"num_prefix_tokens: expected at least 1, got {num_prefix_tokens}; "
                "to do without a prefix set kv_modulation: false"
            )
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size must be a multiple of num_heads, got {hidden_size} and {num_heads}")
        self.num_heads = num_heads
        self.num_layers = num_layers

        self.mlp = nn.Sequential(nn.Linear(feature_dim, feature_dim), nn.GELU(), nn.Linear(feature_dim, hidden_size))
        self.prefix_tokens = nn.Parameter(torch.empty(num_prefix_tokens, hidden_size))
        nn.init.normal_(self.prefix_tokens, std=0.02)  # as LAVIS initialises query tokens
        projected = hidden_size * (num_layers or 1)
        self.k_proj = KeyProjection(hidden_size, projected)
        self.v_proj = nn.Linear(hidden_size, projected)

    def forward(self, features: Tensor, own_softmax: bool = False) -> Tuple[Tensor, Tensor]:
        """Pooled features (b, feature_dim) -> Keys, Values, each (b, h, p, d), or (c, b, h, p, d) per layer.

        ``own_softmax`` tells that no other Keys stand beside these (a gated prefix): see `KeyProjection`.

        Raises:
            ValueError: if ``features`` is not (b, feature_dim).
        """
        expected = self.mlp[0].in_features
        if features.ndim != 2 or features.shape[1] != expected:
            raise ValueError(
                f"expected pooled features (b, {expected}), got {tuple(features.shape)}: "
                "feature_dim must be the auxiliary encoder's"
            )
        tokens = self.prefix_tokens + self.mlp(features).unsqueeze(1)  # (b, p, hidden)
        key = self.k_proj(tokens, bias_counts=not own_softmax)
        return self._split_heads(key), self._split_heads(self.v_proj(tokens))

    def _split_heads(self, projected: Tensor) -> Tensor:
        """(b, p, [c *] h * d) -> ([c,] b, h, p, d)"""
        b, p, _ = projected.shape
        if self.num_layers is None:
            return projected.view(b, p, self.num_heads, -1).transpose(1, 2)
        split = projected.view(b, p, self.num_layers, self.num_heads, -1)
        return split.permute(2, 0, 3, 1, 4)


def prefix_of_each_layer(
    generator: KVPrefixGenerator,
    pooled: Tensor,
    num_layers: int,
    gate: Optional[Tensor] = None,
    dropped: Optional[Tensor] = None,
) -> List[KVPrefix]:
    """Pooled features (b, feature_dim) -> one prefix for each cross-attention layer.

    ``gate`` holds one closed or opened number a layer and head (c, h); with it the prefix has a softmax of its own.
    ``dropped`` (b,) says which samples go without theirs.
    """
    key, value = generator(pooled, own_softmax=gate is not None)
    if key.ndim == 4:  # one prefix, shared by all layers
        key, value = key.expand(num_layers, *key.shape), value.expand(num_layers, *value.shape)
    gates = [None] * num_layers if gate is None else gate.tanh()
    return [KVPrefix(*of_layer, dropped) for of_layer in zip(key, value, gates)]
