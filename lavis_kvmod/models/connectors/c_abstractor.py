"""Honeybee's C-Abstractor (arXiv 2312.06742, section 3.2): convolutions, so that neighbours stay neighbours.

    visual tokens ─► grid + positions ─► blocks ─► pooled to q ─► blocks ─► Linear, SiLU ─► opt_proj

A block is RegNet's (arXiv 2003.13678) with squeeze-and-excitation (arXiv 1709.01507), LayerNorm and SiLU. The class
token has no place in a grid and is left out; so is the end token of the published code. Nothing here attends to the
image: what a second encoder has to say comes as tokens of its own.
"""

import math
from typing import Any, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_kvmod.models.connectors.kv_prefix import KVPrefix
from lavis_kvmod.models.connectors.projectors import tokens_of
from lavis_kvmod.models.connectors.qformer import QFormerOutput
from lavis_kvmod.models.connectors.registry import ConnectorSizes, register_connector
from lavis_kvmod.system.schema import Settings, key


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map (b, width, rows, columns)."""

    def forward(self, x: Tensor) -> Tensor:
        """Any map -> the same shape."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _convolution(in_width: int, width: int, side: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(in_width, width, side, padding=side // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, ChannelNorm(width))


class SqueezeExcitation(nn.Module):
    """Each channel is weighed by what all of them are on average."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.squeeze = nn.Conv2d(width, inner, 1)
        self.excite = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, width, rows, columns) -> the same shape"""
        weights = self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        return x * weights.sigmoid()


class ConvolutionBlock(nn.Module):
    """1×1, 3×3 in each channel, squeeze-and-excitation, 1×1; added to its input, projected if its width differs."""

    def __init__(self, in_width: int, width: int):
        super().__init__()
        self.conv1 = _convolution(in_width, width)
        self.conv2 = _convolution(width, width, side=3, groups=width)
        self.se = SqueezeExcitation(width, round(in_width / 4))
        self.conv3 = _convolution(width, width)
        self.shortcut = _convolution(in_width, width) if in_width != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_width, rows, columns) -> (b, width, rows, columns)"""
        inner = self.se(F.silu(self.conv2(F.silu(self.conv1(x)))))
        return F.silu(self.conv3(inner) + self.shortcut(x))


def _stage(depth: int, in_width: int, width: int) -> nn.Sequential:
    return nn.Sequential(*(ConvolutionBlock(in_width if i == 0 else width, width) for i in range(depth)))


class CAbstractor(nn.Module):
    """The C-Abstractor: a square grid of visual tokens to ``num_queries`` vectors.

    Args:
        visual_width, num_visual_tokens: of the visual tokens: a square number, or one more, a class token first.
        num_queries: vectors it gives, a grid as near to a square as their number allows: 64 are 8×8, 32 are 4×8.
        output_width: of the language model.
        hidden_size: of the convolutions.
        depth: blocks before the pooling, and behind it.

    Raises:
        ValueError: if the visual tokens are no square grid.
    """

    reads_queries = False
    num_attention_heads = num_cross_attention_layers = 0

    def __init__(
        self,
        *,
        visual_width: int,
        num_visual_tokens: int,
        num_queries: int,
        output_width: int,
        hidden_size: int = 1024,
        depth: int = 3,
    ):
        super().__init__()
        self.side = math.isqrt(num_visual_tokens)
        self.class_tokens = num_visual_tokens - self.side**2
        if self.class_tokens > 1:
            raise ValueError(
                "connector c_abstractor: expected a square number of visual tokens, or one more (a class token), got "
                f"{num_visual_tokens}"
            )
        self.hidden_size = output_width
        self.num_outputs = num_queries
        self.pooled_to = most_square(num_queries)
        self.positions = nn.Parameter(torch.randn(self.side**2, visual_width) * 0.02)
        self.before = _stage(depth, visual_width, hidden_size)
        self.behind = _stage(depth, hidden_size, hidden_size)
        self.readout = nn.Linear(hidden_size, output_width)

    def forward(
        self,
        query_embeds: None,
        encoder_hidden_states: Tensor,
        prefix: Optional[Sequence[KVPrefix]] = None,
        output_attentions: bool = False,
    ) -> QFormerOutput:
        """Visual tokens (b, n, width) -> (b, q, output width)."""
        if prefix is not None:
            raise ValueError("the C-Abstractor attends to nothing, so it has no place for a prefix: aux_fusion: tokens")
        tokens = encoder_hidden_states[:, self.class_tokens :] + self.positions
        grid = tokens.transpose(1, 2).unflatten(2, (self.side, self.side))  # (b, width, rows, columns)
        grid = self.behind(F.adaptive_avg_pool2d(self.before(grid), self.pooled_to))
        return QFormerOutput(F.silu(self.readout(grid.flatten(2).transpose(1, 2))))


def most_square(number: int) -> Tuple[int, int]:
    """The two factors of ``number`` that are nearest to each other, the smaller one first."""
    rows = next(side for side in range(math.isqrt(number), 0, -1) if number % side == 0)
    return rows, number // rows


class CAbstractorGeometry(Settings):
    """Sizes of ``connector: c_abstractor``."""

    hidden_size: int = key(1024, "width of the convolutions", gt=0)
    depth: int = key(3, "blocks before the pooling, and as many behind it", gt=0)


@register_connector("c_abstractor", attends=False, geometry=CAbstractorGeometry)
def build_c_abstractor(settings: Any, sizes: ConnectorSizes) -> CAbstractor:
    """Honeybee's: convolutions, pooling to the query tokens' number, convolutions (arXiv 2312.06742)."""
    geometry = CAbstractorGeometry.of(sizes.geometry)
    return CAbstractor(
        visual_width=sizes.visual_width,
        num_visual_tokens=tokens_of(sizes, "c_abstractor"),
        num_queries=sizes.num_queries,
        output_width=sizes.output_width or sizes.visual_width,
        **geometry.model_dump(),
    )
