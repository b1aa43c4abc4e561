"""Flamingo's way into the language model (arXiv 2204.14198, section 3.1.2 and figure 4): layers between its own.

    text ─► layer 1 … k-1 ─► gated layer ─► layer k … ─► …       every k-th; OPT's own stay frozen
                                  ▲
                  Keys, Values:  what the connector made of the image

    gated layer    x ─► + tanh(a) · attention(norm(x), image) ─► + tanh(b) · feed-forward ─►

Both gates are 0 at the start: the language model is then exactly what it was. No positions are taken by the image.
"""

from contextlib import contextmanager
from typing import Any, Iterator, Tuple

import torch
from torch import Tensor, nn

from lavis_kvmod.models.connectors.perceiver import feed_forward
from lavis_kvmod.models.connectors.qformer import MultiHeadAttention


class GatedLayer(nn.Module):
    """Text attends to the image; then a feed-forward. What either adds goes through a gate, closed at first."""

    def __init__(self, *, width: int, image_width: int, num_heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = MultiHeadAttention(
            hidden_size=width, num_heads=num_heads, kv_width=image_width, dropout=0.0, bias=False
        )
        self.out_proj = nn.Linear(width, width, bias=False)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.feed_forward = feed_forward(width, ratio=4)
        self.feed_forward_gate = nn.Parameter(torch.zeros(1))

    def forward(self, states: Tensor, image: Tensor) -> Tensor:
        """States (b * copies, t, width), image (b, q, image width) -> states, in their own precision."""
        x = states.to(self.norm.weight.dtype)  # the language model's half precision is too coarse to train in
        image = image.to(x.dtype).repeat_interleave(len(states) // len(image), dim=0)
        attended, _, _ = self.attention(self.norm(x), image)
        x = x + self.attention_gate.tanh() * self.out_proj(attended)
        x = x + self.feed_forward_gate.tanh() * self.feed_forward(x)
        return x.to(states.dtype)


class GatedLayers(nn.Module):
    """The gated layers of a language model, one in front of every k-th of its own.

    Args:
        width, num_layers, num_heads: of the language model; a gated layer has as many heads.
        image_width: of what the connector gives.
        every: k; the first one stands in front of the k-th layer.

    Raises:
        ValueError: if the language model has not so many layers.
    """

    def __init__(self, *, width: int, num_layers: int, num_heads: int, image_width: int, every: int = 4):
        super().__init__()
        if every > num_layers:
            raise ValueError(f"gated_every: expected at most {num_layers}, the language model's layers, got {every}")
        self.places = tuple(range(every - 1, num_layers, every))
        self.layers = nn.ModuleList(
            GatedLayer(width=width, image_width=image_width, num_heads=num_heads) for _ in self.places
        )

    @contextmanager
    def within(self, opt: Any, image: Tensor) -> Iterator[None]:
        """The language model ``opt`` sees ``image`` (b, q, image width) inside; outside nothing of it is left on it.

        Rows of ``opt`` are those of ``image``, or several copies of each, side by side.
        """
        handles = [
            opt.model.decoder.layers[place].register_forward_pre_hook(_before(layer, image))
            for place, layer in zip(self.places, self.layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _before(layer: nn.Module, image: Tensor) -> Any:
    def hook(module: nn.Module, args: Tuple[Any, ...]) -> Tuple[Any, ...]:
        return (layer(args[0], image), *args[1:])

    return hook
