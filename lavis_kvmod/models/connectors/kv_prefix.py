"""From the auxiliary encoder's features to Keys and Values that cross-attention meets in front of the image's.

Prefix-tuning (arXiv 2101.00190) learns one Key/Value prefix for a task; here an image writes its own. The prefix is
handed on as an argument (`KVPrefix`), never stored on a module.
"""

from typing import Any, List, NamedTuple, Optional, Sequence, Tuple, Union

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
    """Writes a Key/Value prefix from image features.

    An MLP brings the features to the Q-Former's width; the result shifts a set of learnable prefix tokens, and two
    projections turn those into Keys and Values, split into heads (docs/architecture.md). Of a grid each cell's features
    become a token, which a position embedding is added to.

        pooled  (b, f)    ─► mlp ─► (b, 1, hidden) + prefix tokens (p, hidden)        ─┬─► k_proj ─► K (b, h, p, d)
        grid    (b, p, f) ─► mlp ─► (b, p, hidden) + position embeddings (p, hidden)  ─┴─► v_proj ─► V (b, h, p, d)

    Args:
        feature_dim: width of the auxiliary encoder's features (1536 for EfficientNet-B3).
        hidden_size: width of the Q-Former.
        num_prefix_tokens: how many Key/Value positions are put in front of the visual tokens.
        num_heads: attention heads of the Q-Former; must divide ``hidden_size``.
        num_layers: None writes one prefix for all cross-attention layers; a number writes one for each, from
            projections of their own.
        grid: the features are those of a grid of ``num_prefix_tokens`` cells.
        attention_width: of all heads together, where it is not ``hidden_size``.

    Raises:
        ValueError: if a size is not positive or ``num_heads`` does not divide the attention's width.
    """

    def __init__(
        self,
        feature_dim: int = 1536,
        hidden_size: int = 768,
        num_prefix_tokens: int = 8,
        num_heads: int = 12,
        num_layers: Optional[int] = None,
        grid: bool = False,
        attention_width: Optional[int] = None,
    ):
        super().__init__()
        attention_width = attention_width or hidden_size
        if num_prefix_tokens < 1:
            raise ValueError(
                f"num_prefix_tokens: expected at least 1, got {num_prefix_tokens}; "
                "to do without a prefix set kv_modulation: false"
            )
        if attention_width % num_heads:
            raise ValueError(f"hidden_size must be a multiple of num_heads, got {attention_width} and {num_heads}")
        self.feature_dim = feature_dim
        self.num_positions = num_prefix_tokens
        self.grid = grid
        self.num_heads = num_heads
        self.num_layers = num_layers

        self.mlp = nn.Sequential(nn.Linear(feature_dim, feature_dim), nn.GELU(), nn.Linear(feature_dim, hidden_size))
        learned = nn.Parameter(torch.empty(num_prefix_tokens, hidden_size))
        nn.init.normal_(learned, std=0.02)  # as LAVIS initialises query tokens
        # By another name, so that a checkpoint of the one does not fit the other, whatever their numbers.
        self.register_parameter("position_embeddings" if grid else "prefix_tokens", learned)
        projected = attention_width * (num_layers or 1)
        self.k_proj = KeyProjection(hidden_size, projected)
        self.v_proj = nn.Linear(hidden_size, projected)

    def forward(self, features: Tensor, own_softmax: bool = False) -> Tuple[Tensor, Tensor]:
        """Features (b, feature_dim), of a grid (b, p, feature_dim), -> Keys, Values, each (b, h, p, d), or, with one a
        layer, (c, b, h, p, d).

        ``own_softmax`` tells that no other Keys stand beside these (a gated prefix): see `KeyProjection`.

        Raises:
            ValueError: if ``features`` has another shape.
        """
        return self.project(self.tokens(features), own_softmax)

    def tokens(self, features: Tensor) -> Tensor:
        """As `forward`, as far as the tokens (b, p, hidden) that Keys and Values are made of."""
        shape = (self.num_positions, self.feature_dim) if self.grid else (self.feature_dim,)
        if features.shape[1:] != shape:
            kind = "features of a grid" if self.grid else "pooled features"
            raise ValueError(
                f"expected {kind} (b, {', '.join(map(str, shape))}), got {tuple(features.shape)}: "
                "feature_dim must be the auxiliary encoder's"
            )
        if self.grid:
            return self.position_embeddings + self.mlp(features)
        return self.prefix_tokens + self.mlp(features).unsqueeze(1)

    def project(self, tokens: Tensor, own_softmax: bool = False) -> Tuple[Tensor, Tensor]:
        """Those tokens to Keys and Values."""
        key = self.k_proj(tokens, bias_counts=not own_softmax)
        return self._split_heads(key), self._split_heads(self.v_proj(tokens))

    def _split_heads(self, projected: Tensor) -> Tensor:
        """(b, p, [c *] h * d) -> ([c,] b, h, p, d)"""
        b, p, _ = projected.shape
        if self.num_layers is None:
            return projected.view(b, p, self.num_heads, -1).transpose(1, 2)
        split = projected.view(b, p, self.num_layers, self.num_heads, -1)
        return split.permute(2, 0, 3, 1, 4)


class KVPrefixGenerators(nn.Module):
    """One generator for each of several auxiliary encoders; their prefixes stand one behind the other, in this order.

        features (b, …, f1 + f2) ─┬─► generator 1 ─► p positions ─┬─► [ prefix 1 | prefix 2 ]
                                  └─► generator 2 ─► p positions ─┘

    Called like a `KVPrefixGenerator`.
    """

    def __init__(self, generators: Sequence[KVPrefixGenerator]):
        super().__init__()
        self.of = nn.ModuleList(generators)
        self.feature_dim = sum(each.feature_dim for each in generators)
        self.num_positions = sum(each.num_positions for each in generators)

    def forward(self, features: Tensor, own_softmax: bool = False) -> Tuple[Tensor, Tensor]:
        """See `KVPrefixGenerator.forward`."""
        return self.project(self.tokens(features), own_softmax)

    def tokens(self, features: Tensor) -> Tensor:
        """See `KVPrefixGenerator.tokens`."""
        each: List[Any] = list(self.of)
        if features.shape[-1] != self.feature_dim:
            raise ValueError(
                f"expected features (b, …, {self.feature_dim}) of {len(each)} encoders, got {tuple(features.shape)}"
            )
        parts = features.split([one.feature_dim for one in each], dim=-1)
        return torch.cat([one.tokens(part) for one, part in zip(each, parts)], dim=1)

    def project(self, tokens: Tensor, own_softmax: bool = False) -> Tuple[Tensor, Tensor]:
        """See `KVPrefixGenerator.project`."""
        each: List[Any] = list(self.of)
        parts = tokens.split([one.num_positions for one in each], dim=1)
        keys, values = zip(*(one.project(part, own_softmax) for one, part in zip(each, parts)))
        return torch.cat(keys, dim=-2), torch.cat(values, dim=-2)


PrefixGenerator = Union[KVPrefixGenerator, KVPrefixGenerators]


def prefix_generator(feature_dims: Sequence[int], **sizes: Any) -> PrefixGenerator:
    """The generator for one auxiliary encoder, or for several; ``sizes`` are the other arguments of each."""
    made = [KVPrefixGenerator(feature_dim=width, **sizes) for width in feature_dims]
    return made[0] if len(made) == 1 else KVPrefixGenerators(made)


def prefix_of_each_layer(
    generator: PrefixGenerator,
    pooled: Tensor,
    num_layers: int,
    gate: Optional[Tensor] = None,
    dropped: Optional[Tensor] = None,
) -> List[KVPrefix]:
    """Features, as `KVPrefixGenerator.forward` takes them, -> one prefix for each cross-attention layer.

    ``gate`` holds one closed or opened number a layer and head (c, h); with it the prefix has a softmax of its own.
    ``dropped`` (b,) says which samples go without theirs.
    """
    return for_each_layer(generator(pooled, own_softmax=gate is not None), num_layers, gate, dropped)


def for_each_layer(
    key_value: Tuple[Tensor, Tensor], num_layers: int, gate: Optional[Tensor], dropped: Optional[Tensor]
) -> List[KVPrefix]:
    """Keys and Values of one prefix, or of one a layer, -> a prefix for each layer; as `prefix_of_each_layer`."""
    key, value = key_value
    if key.ndim == 4:  # one prefix, shared by all layers
        key, value = key.expand(num_layers, *key.shape), value.expand(num_layers, *value.shape)
    gates = [None] * num_layers if gate is None else gate.tanh()
    return [KVPrefix(*of_layer, dropped) for of_layer in zip(key, value, gates)]
