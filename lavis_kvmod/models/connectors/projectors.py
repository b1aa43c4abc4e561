"""LLaVA's projectors: every visual token becomes a vector of the soft prompt, by itself.

    linear   visual token ─────────────────────► opt_proj ─► vector
    mlp      visual token ─► Linear ─► GELU ───► opt_proj ─► vector

LLaVA (arXiv 2304.08485) has the first, LLaVA-1.5 (arXiv 2310.03744) the second. LLaVA leaves CLIP's class token out;
here every token of the image encoder is taken, as BLIP-2's Q-Former takes them. Nothing here attends to the image: what
a second encoder has to say comes as tokens of its own.
"""

from typing import Any, Optional, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from lavis_kvmod.models.connectors.kv_prefix import KVPrefix
from lavis_kvmod.models.connectors.qformer import QFormerOutput
from lavis_kvmod.models.connectors.registry import ConnectorSizes, NoSizes, register_connector


class Projector(nn.Module):
    """What stands before the last projection, ``opt_proj``: nothing, or a layer with GELU.

    Args:
        visual_width: of the visual tokens.
        num_visual_tokens: how many there are; as many vectors come out.
        hidden_size: width of the layer; None has none.
    """

    reads_queries = False
    num_attention_heads = num_cross_attention_layers = 0

    def __init__(self, *, visual_width: int, num_visual_tokens: int, hidden_size: Optional[int] = None):
        super().__init__()
        self.hidden_size = hidden_size or visual_width
        self.num_outputs = num_visual_tokens
        self.proj = nn.Linear(visual_width, hidden_size) if hidden_size else None

    def forward(
        self,
        query_embeds: None,
        encoder_hidden_states: Tensor,
        prefix: Optional[Sequence[KVPrefix]] = None,
        output_attentions: bool = False,
    ) -> QFormerOutput:
        """Visual tokens (b, n, width) -> (b, n, hidden)."""
        if prefix is not None:
            raise ValueError("a projector attends to nothing, so it has no place for a prefix: set aux_fusion: tokens")
        if self.proj is None:
            return QFormerOutput(encoder_hidden_states)
        return QFormerOutput(F.gelu(self.proj(encoder_hidden_states)))


@register_connector("linear", attends=False, one_a_token=True, geometry=NoSizes)
def build_linear(settings: Any, sizes: ConnectorSizes) -> Projector:
    """LLaVA's: one projection of every visual token (arXiv 2304.08485)."""
    return Projector(visual_width=sizes.visual_width, num_visual_tokens=tokens_of(sizes, "linear"))


@register_connector("mlp", attends=False, one_a_token=True, geometry=NoSizes)
def build_mlp(settings: Any, sizes: ConnectorSizes) -> Projector:
    """LLaVA-1.5's: two layers with GELU over every visual token (arXiv 2310.03744)."""
    return Projector(
        visual_width=sizes.visual_width,
        num_visual_tokens=tokens_of(sizes, "mlp"),
        hidden_size=sizes.output_width,
    )


def tokens_of(sizes: ConnectorSizes, name: str) -> int:
    """How many visual tokens there are.

    Raises:
        ValueError: if the image encoder does not say.
    """
    if sizes.num_visual_tokens is None:
        raise ValueError(
            f"connector {name} has to know how many visual tokens there are: give the image encoder's module an "
            "attribute num_tokens, or take connector qformer, perceiver or visual_abstractor"
        )
    return sizes.num_visual_tokens
