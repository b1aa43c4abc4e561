"""EVA's attention by PyTorch's fused kernel."""

from typing import Optional

import torch
import torch.nn.functional as F
from lavis.models import eva_vit
from torch import Tensor, nn


class FusedAttention(eva_vit.Attention):
    """LAVIS's EVA attention by `torch.nn.functional.scaled_dot_product_attention`: no map of all tokens is kept.

    Equal to LAVIS's to rounding. A relative position bias, or another scale, go LAVIS's way; BLIP-2's has neither.
    """

    def forward(self, x: Tensor, rel_pos_bias: Optional[Tensor] = None) -> Tensor:
        """(b, n, width) -> (b, n, width)"""
        usual_scale = (self.proj.in_features // self.num_heads) ** -0.5
        biased = rel_pos_bias is not None or self.relative_position_bias_table is not None
        if biased or self.scale != usual_scale:
            return super().forward(x, rel_pos_bias)
        bias = None
        if self.q_bias is not None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias, requires_grad=False), self.v_bias))
        query, key, value = (
            F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        )  # (b, heads, n, head width) each
        dropout = self.attn_drop.p if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return self.proj_drop(self.proj(attended.transpose(1, 2).flatten(2)))


def use_fused_attention(vit: nn.Module) -> None:
    """Have all of LAVIS's EVA attention in a module go by `FusedAttention`, with the weights it has."""
    for module in vit.modules():
        if type(module) is eva_vit.Attention:
            module.__class__ = FusedAttention
