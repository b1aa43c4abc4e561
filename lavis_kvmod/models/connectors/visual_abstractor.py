"""mPLUG-Owl's visual abstractor (arXiv 2304.14178, section 3.2), with a Key/Value prefix.

    query_tokens ─► queries ──┬─► norm ─► attention ─► + ─► norm ─► SwiGLU, norm ─► + ─► …
                              │              ▲                                         each layer
                              └──────► norm of [ image | queries ]  behind the prefix

Close to the Perceiver, with biases, one norm over image and queries, and a gated feed-forward (SwiGLU, arXiv
2002.05202) with a norm inside. Tables that go round call it C-Abstractor, too; Honeybee's is another one
(`lavis_kvmod.models.connectors.c_abstractor`). The published code adds sine positions to the Keys, which the ViT's
tokens have already, and an end token to the output: both are left out.
"""

from typing import Any, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_kvmod.models.connectors.kv_prefix import KVPrefix
from lavis_kvmod.models.connectors.qformer import MultiHeadAttention, QFormerOutput
from lavis_kvmod.models.connectors.registry import ConnectorSizes, register_connector
from lavis_kvmod.models.connectors.resampling import require_heads, resample
from lavis_kvmod.system.schema import Settings, key


class GatedFeedForward(nn.Module):
    """w2(norm(silu(w1 x) ⊙ w3 x)); (…, width) -> (…, width)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.w1 = nn.Linear(width, inner)
        self.w3 = nn.Linear(width, inner)
        self.norm = nn.LayerNorm(inner)
        self.w2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.w2(self.norm(F.silu(self.w1(x)) * self.w3(x)))


class AbstractorLayer(nn.Module):
    """Queries attend to the image and to themselves; then the gated feed-forward."""

    def __init__(self, *, width: int, num_heads: int, inner: int):
        super().__init__()
        self.norm_queries = nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(width)
        self.attention = MultiHeadAttention(hidden_size=width, num_heads=num_heads, kv_width=width, dropout=0.0)
        self.out_proj = nn.Linear(width, width)
        self.norm_feed_forward = nn.LayerNorm(width)
        self.feed_forward = GatedFeedForward(width, inner)

    def forward(
        self, queries: Tensor, image: Tensor, prefix: Optional[KVPrefix], output_attentions: bool
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """Queries (b, q, width), image (b, n, width) -> queries; map (b, h, q, p + n + q) if asked for."""
        context = self.norm_context(torch.cat([image, queries], dim=1))
        attended, probs, _ = self.attention(
            self.norm_queries(queries), context, prefix=prefix, output_attentions=output_attentions
        )
        queries = queries + self.out_proj(attended)
        return queries + self.feed_forward(self.norm_feed_forward(queries)), probs


class VisualAbstractor(nn.Module):
    """The visual abstractor: q learned queries (the model's ``query_tokens``) over the visual tokens.

    Args:
        width: of the visual tokens and queries.
        num_queries: queries.
        depth, num_heads: layers, and heads of each.
        ratio: a feed-forward has as many numbers as a plain one that is ``ratio`` times wider: 2/3 of it inside.

    Raises:
        ValueError: if ``num_heads`` does not divide ``width``.
    """

    def __init__(self, *, width: int, num_queries: int, depth: int = 6, num_heads: int = 16, ratio: int = 4):
        super().__init__()
        require_heads("visual_abstractor", width, num_heads)
        self.hidden_size = width
        self.num_outputs = num_queries
        self.num_attention_heads = num_heads
        self.num_cross_attention_layers = depth
        inner = 2 * ratio * width // 3
        self.layers = nn.ModuleList(
            AbstractorLayer(width=width, num_heads=num_heads, inner=inner) for _ in range(depth)
        )

    def forward(
        self,
        query_embeds: Tensor,
        encoder_hidden_states: Tensor,
        prefix: Optional[Sequence[KVPrefix]] = None,
        output_attentions: bool = False,
    ) -> QFormerOutput:
        """Queries (b, q, width) over visual tokens (b, n, width) -> queries, and maps as `Perceiver.forward` has them.

        Raises:
            ValueError: for another number of prefixes than layers.
        """
        queries, maps = resample(self.layers, query_embeds, encoder_hidden_states, prefix, output_attentions)
        return QFormerOutput(queries, cross_attentions=maps)


class VisualAbstractorGeometry(Settings):
    """Sizes of ``connector: visual_abstractor``."""

    depth: int = key(6, "layers", gt=0)
    num_heads: int = key(16, "attention heads; a divisor of the visual tokens' width", gt=0)
    ratio: int = key(4, "how much wider a plain feed-forward of as many numbers were", gt=0)


@register_connector("visual_abstractor", geometry=VisualAbstractorGeometry)
def build_visual_abstractor(settings: Any, sizes: ConnectorSizes) -> VisualAbstractor:
    """mPLUG-Owl's: learned queries over image and queries (arXiv 2304.14178)."""
    geometry = VisualAbstractorGeometry.of(sizes.geometry)
    return VisualAbstractor(width=sizes.visual_width, num_queries=sizes.num_queries, **geometry.model_dump())
