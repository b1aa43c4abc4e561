"""OPT's attention: PyTorch's fused kernel, and Keys and Values that have their place beforehand."""

from typing import Any, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from lavis.models.blip2_models.modeling_opt import OPTAttention
from torch import Tensor

KeyValue = Tuple[Tensor, Tensor]  # of a layer, (rows, heads, positions, head width) each


class KeyValueCache:
    """Keys and Values of all layers for sequences that begin alike and go on in several copies.

        positions   [ shared beginning, the same in all copies | what each copy has said | room ]

    All memory is taken at once: a step writes its position, and copies nothing that is there. Where copies change
    places, as a search's beams do, only what they have said moves.

    Args:
        beginning: each layer's Keys and Values (b, heads, p, head width).
        copies: how many sequences go on from each row; row i's are rows i * copies, …
        room: most positions that may be added.
    """

    def __init__(self, beginning: Sequence[KeyValue], copies: int, room: int):
        key = beginning[0][0]
        b, heads, self.shared, width = key.shape
        self.length = self.shared
        self._store = key.new_empty(len(beginning), 2, b * copies, heads, self.shared + room, width)
        for layer, pair in zip(self._store, beginning):
            for place, state in zip(layer, pair):
                place.unflatten(0, (b, copies))[..., : self.shared, :] = state.unsqueeze(1)

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, layer: int) -> "LayerCache":
        return LayerCache(self, self._store[layer])

    @property
    def nbytes(self) -> int:
        """What it takes, room included."""
        return self._store.numel() * self._store.element_size()

    def reorder(self, rows: Tensor) -> None:
        """Let row i go on from what row ``rows[i]``, of the same beginning, has said."""
        said = self._store[..., self.shared : self.length, :]
        said.copy_(said.index_select(2, rows))


class LayerCache:
    """A layer's part of a `KeyValueCache`: what LAVIS's decoder hands to the layer as its past."""

    def __init__(self, cache: KeyValueCache, states: Tensor):
        self._cache, self._states = cache, states

    def __getitem__(self, index: int) -> Tensor:
        return self._states[index, :, :, : self._cache.length]

    def add(self, key: Tensor, value: Tensor) -> KeyValue:
        """Write the Keys and Values of the next positions; returns all up to them."""
        end = self._cache.length + key.shape[2]
        for place, state in zip(self._states, (key, value)):
            place[:, :, self._cache.length : end] = state
        keys, values = self._states[:, :, :, :end]
        return keys, values


class CachedAttention(OPTAttention):
    """LAVIS's ``OPTAttention``, by `torch.nn.functional.scaled_dot_product_attention`; a frozen one, without dropout.

    ``past_key_value`` is a pair of tensors as in LAVIS, or a `LayerCache` or its like, which is written in place.
    Several positions without an ``attention_mask`` attend causally, which needs none to be made and takes the fastest
    kernel; a mask may also be of booleans, true where a position is seen.
    """

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Optional[Tensor] = None,
        past_key_value: Any = None,
        attention_mask: Optional[Tensor] = None,
        layer_head_mask: Optional[Tensor] = None,
        output_attentions: bool = False,
    ) -> Tuple[Tensor, Optional[Tensor], Optional[KeyValue]]:
        """Arguments and results as LAVIS's; (b, t, width) -> (b, t, width), None, all Keys and Values."""
        asked = key_value_states is not None or layer_head_mask is not None or output_attentions
        if asked:
            return super().forward(
                hidden_states, key_value_states, past_key_value, attention_mask, layer_head_mask, output_attentions
            )
        query, key, value = (self._heads(of(hidden_states)) for of in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(past_key_value, "add"):
            key, value = past_key_value.add(key, value)
        elif past_key_value is not None:
            key, value = (torch.cat(pair, dim=2) for pair in zip(past_key_value, (key, value)))
        if attention_mask is not None and attention_mask.dtype not in (query.dtype, torch.bool):  # under autocast
            attention_mask = attention_mask.clamp(min=torch.finfo(query.dtype).min).to(query.dtype)
        is_causal = attention_mask is None and past_key_value is None and query.shape[2] > 1
        # (b, heads, t, head width)
        attended = F.scaled_dot_product_attention(query, key, value, attention_mask, is_causal=is_causal)
        return self.out_proj(attended.transpose(1, 2).flatten(2)), None, (key, value)

    def _heads(self, states: Tensor) -> Tensor:
        """(b, t, width) -> (b, heads, t, head width)"""
        return states.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)


def use_cached_attention(layers: Sequence[torch.nn.Module]) -> None:
    """Have LAVIS's decoder layers attend by `CachedAttention`, with the projections that they have."""
    for layer in layers:
        layer.self_attn.__class__ = CachedAttention


__all__: List[str] = ["CachedAttention", "KeyValueCache", "LayerCache", "use_cached_attention"]
