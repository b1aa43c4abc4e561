"""Flamingo's Perceiver Resampler (arXiv 2204.14198, section 3.1.1 and figure 5), with a Key/Value prefix.

    query_tokens ─► latents ──┬──────────────────────────► + ──► + feed-forward ─► … ─► norm
                              ▼   queries                  ▲
                         attention ────────────────────────┘          each layer
                              ▲   Keys, Values
                    [ prefix | image (+ time) | latents ]

The latents attend to the image and to themselves in one softmax: that is its self-attention. Projections have no bias,
and the feed-forward is a squared ReLU (Flamingo's table 5).
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


class SquaredReLU(nn.Module):
    """relu(x)² (Primer, arXiv 2109.08668)."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same."""
        return F.relu(x).square()


def feed_forward(width: int, ratio: int) -> nn.Sequential:
    """Flamingo's: norm, widening, squared ReLU, narrowing, without biases; (…, width) -> (…, width)."""
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, ratio * width, bias=False),
        SquaredReLU(),
        nn.Linear(ratio * width, width, bias=False),
    )


class PerceiverLayer(nn.Module):
    """Latents attend to the image and to themselves; then a feed-forward."""

    def __init__(self, *, width: int, num_heads: int, ratio: int):
        super().__init__()
        self.norm_latents = nn.LayerNorm(width)
        self.norm_image = nn.LayerNorm(width)
        self.attention = MultiHeadAttention(
            hidden_size=width, num_heads=num_heads, kv_width=width, dropout=0.0, bias=False
        )
        self.out_proj = nn.Linear(width, width, bias=False)
        self.feed_forward = feed_forward(width, ratio)

    def forward(
        self, latents: Tensor, image: Tensor, prefix: Optional[KVPrefix], output_attentions: bool
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """Latents (b, q, width), image (b, n, width) -> latents; map (b, h, q, p + n + q) if asked for."""
        queries = self.norm_latents(latents)
        context = torch.cat([self.norm_image(image), queries], dim=1)
        attended, probs, _ = self.attention(queries, context, prefix=prefix, output_attentions=output_attentions)
        latents = latents + self.out_proj(attended)
        return latents + self.feed_forward(latents), probs


class Perceiver(nn.Module):
    """The Perceiver Resampler: any number of visual tokens, of one image or several frames, to q latents.

    The latents that it starts from are the model's ``query_tokens``.

    Args:
        width: of the visual tokens and latents.
        num_queries: latents.
        depth, num_heads, ratio: layers, heads, and how much wider a feed-forward is.
        max_frames: frames that have a time embedding.

    Raises:
        ValueError: if ``num_heads`` does not divide ``width``.
    """

    def __init__(
        self, *, width: int, num_queries: int, depth: int = 6, num_heads: int = 16, ratio: int = 4, max_frames: int = 8
    ):
        super().__init__()
        require_heads("perceiver", width, num_heads)
        self.hidden_size = width
        self.num_outputs = num_queries
        self.num_attention_heads = num_heads
        self.num_cross_attention_layers = depth
        self.time_embeddings = nn.Parameter(torch.randn(max_frames, 1, width) * 0.02)
        self.layers = nn.ModuleList(PerceiverLayer(width=width, num_heads=num_heads, ratio=ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        query_embeds: Tensor,
        encoder_hidden_states: Tensor,
        prefix: Optional[Sequence[KVPrefix]] = None,
        output_attentions: bool = False,
    ) -> QFormerOutput:
        """Latents (b, q, width) over visual tokens (b, n, width), or those of frames (b, frames, n, width).

        Returns:
            Latents (b, q, width); maps (b, h, q, p + n) without the columns of the latents themselves, so that their
            rows sum to less than 1.

        Raises:
            ValueError: for more frames than have an embedding, or another number of prefixes than layers.
        """
        frames = encoder_hidden_states if encoder_hidden_states.ndim == 4 else encoder_hidden_states.unsqueeze(1)
        if frames.shape[1] > len(self.time_embeddings):
            raise ValueError(
                f"expected at most {len(self.time_embeddings)} frames, got {frames.shape[1]}: set "
                "connector_geometry.max_frames"
            )
        image = (frames + self.time_embeddings[: frames.shape[1]]).flatten(1, 2)  # (b, frames * n, width)
        latents, maps = resample(self.layers, query_embeds, image, prefix, output_attentions)
        return QFormerOutput(self.norm(latents), cross_attentions=maps)


class PerceiverGeometry(Settings):
    """Sizes of ``connector: perceiver``."""

    depth: int = key(6, "layers", gt=0)
    num_heads: int = key(16, "attention heads; a divisor of the visual tokens' width", gt=0)
    ratio: int = key(4, "how much wider a feed-forward is", gt=0)
    max_frames: int = key(8, "frames that have a time embedding", gt=0)


@register_connector("perceiver", geometry=PerceiverGeometry)
def build_perceiver(settings: Any, sizes: ConnectorSizes) -> Perceiver:
    """Flamingo's: latents that attend to the image and to themselves (arXiv 2204.14198)."""
    geometry = PerceiverGeometry.of(sizes.geometry)
    return Perceiver(width=sizes.visual_width, num_queries=sizes.num_queries, **geometry.model_dump())
