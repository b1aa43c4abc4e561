"""Flamingo's way into the language model (arXiv 2204.14198, section 3.1.2 and figure 4): layers between its own.

    text ─► layer 1 … k-1 ─► gated layer ─► layer k … ─► …       every k-th; OPT's own stay frozen
                                  ▲
          Keys, Values:  [ prefix | what the connector made of the image ]

    gated layer    x ─► + tanh(a) · attention(norm(x), image) ─► + tanh(b) · feed-forward ─►

Both gates are 0 at the start: the language model is then exactly what it was. No positions are taken by the image. The
prefix is written for these layers by a generator of their own; its tokens travel in front of the image's, (b, p + q,
image width), and are all 0 where a sample goes without.
"""

from contextlib import contextmanager
from typing import Any, Iterator, List, Optional, Tuple, cast

import torch
from torch import Tensor, nn

from lavis_kvmod.models.connectors.kv_prefix import KVPrefix, PrefixGenerator, for_each_layer
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

    def forward(self, states: Tensor, image: Tensor, prefix: Optional[KVPrefix] = None) -> Tensor:
        """States (b * copies, t, width), image (b, q, image width) and its prefix -> states, in their own precision."""
        x = states.to(self.norm.weight.dtype)  # the language model's half precision is too coarse to train in
        copies = len(states) // len(image)
        image = image.to(x.dtype).repeat_interleave(copies, dim=0)
        attended, _, _ = self.attention(self.norm(x), image, prefix=_copied(prefix, copies))
        x = x + self.attention_gate.tanh() * self.out_proj(attended)
        x = x + self.feed_forward_gate.tanh() * self.feed_forward(x)
        return x.to(states.dtype)


class GatedLayers(nn.Module):
    """The gated layers of a language model, one in front of every k-th of its own.

    Args:
        width, num_layers, num_heads: of the language model; a gated layer has as many heads.
        image_width: of what the connector gives.
        every: k; the first one stands in front of the k-th layer.

    Without `add_prefix` they attend to the image alone.

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
        self._heads = num_heads
        self.kv_prefix: Optional[PrefixGenerator] = None
        self.kv_gate: Optional[nn.Parameter] = None

    def add_prefix(self, generator: PrefixGenerator, prefix_gate: str = "none") -> None:
        """Put a prefix of the image width in front of the image, beside it or (``tanh``) behind a gate."""
        self.kv_prefix = generator
        if prefix_gate == "tanh":
            self.kv_gate = nn.Parameter(torch.zeros(len(self.places), self._heads))

    def beside_prefix(self, image: Tensor, features: Optional[Tensor], dropped: Optional[Tensor] = None) -> Tensor:
        """Image (b, q, image width) -> [prefix tokens | image], (b, p + q, image width), as `within` takes it.

        Args:
            features: of the auxiliary encoder; None gives no sample a prefix.
            dropped: (b,), the samples that go without theirs.
        """
        if self.kv_prefix is None:
            return image
        if features is None:
            tokens = image.new_zeros(len(image), self.kv_prefix.num_positions, image.shape[-1])
        else:
            tokens = self.kv_prefix.tokens(features).to(image.dtype)
        if dropped is not None:
            tokens = tokens * ~dropped.view(-1, 1, 1)
        return torch.cat([tokens, image], dim=1)

    def _split(self, seen: Tensor) -> Tuple[Tensor, List[Optional[KVPrefix]]]:
        """What `beside_prefix` gives -> the image, and each layer's prefix."""
        if self.kv_prefix is None:
            return seen, [None] * len(self.layers)
        positions = self.kv_prefix.num_positions
        tokens, image = seen[:, :positions], seen[:, positions:]
        key_value = self.kv_prefix.project(tokens, own_softmax=self.kv_gate is not None)
        absent = (tokens == 0).flatten(1).all(1)
        return image, [*for_each_layer(key_value, len(self.layers), self.kv_gate, absent)]

    @contextmanager
    def within(self, opt: Any, image: Tensor) -> Iterator[None]:
        """Inside, the language model ``opt`` sees ``image`` (b, q, image width), its prefix in front; outside nothing
        of it is left on it.

        Rows of ``opt`` are those of ``image``, or several copies of each, side by side.
        """
        image, prefixes = self._split(image)
        handles = [
            opt.model.decoder.layers[place].register_forward_pre_hook(_before(layer, image, prefix))
            for place, layer, prefix in zip(self.places, self.layers, prefixes)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _copied(prefix: Optional[KVPrefix], copies: int) -> Optional[KVPrefix]:
    """Several copies of each sample's, side by side."""
    if prefix is None or copies == 1:
        return prefix
    of_samples = (prefix.key, prefix.value, prefix.dropped)
    key, value, dropped = (None if part is None else part.repeat_interleave(copies, dim=0) for part in of_samples)
    return KVPrefix(cast(Tensor, key), cast(Tensor, value), prefix.gate, dropped)


def _before(layer: nn.Module, image: Tensor, prefix: Optional[KVPrefix]) -> Any:
    def hook(module: nn.Module, args: Tuple[Any, ...]) -> Tuple[Any, ...]:
        return (layer(args[0], image, prefix), *args[1:])

    return hook
