"""The connectors by name, and how to add one: what makes query outputs of visual tokens."""

from typing import Any, Callable, NamedTuple, Optional

from lavis_kvmod.system.registry import Registry

# What a `ConnectorBuilder` gives: a module with the attributes and the `forward` that `register_connector` describes.
Connector = Any


class ConnectorSizes(NamedTuple):
    """What a connector has to fit: the visual tokens' width, how many query tokens there are, and, for a text side of
    its own, the size of the vocabulary."""

    visual_width: int
    num_queries: int
    vocab_size: Optional[int] = None


ConnectorBuilder = Callable[[Any, ConnectorSizes], Connector]

CONNECTORS: Registry[ConnectorBuilder] = Registry("connector", "connector")


def register_connector(name: str) -> Callable[[ConnectorBuilder], ConnectorBuilder]:
    """Add a connector: a decorator for the function that builds it from the ``model:`` section and the sizes.

        @register_connector("my-connector")
        def my_connector(settings, sizes) -> nn.Module:
            …

    The module stands where the Q-Former stands (its weights are ``Qformer.*`` in a checkpoint), and is called like it:
    ``forward(query_embeds, encoder_hidden_states, prefix, output_attentions)`` with query tokens (b, q, hidden), visual
    tokens (b, n, width) and one `KVPrefix` for each cross-attention layer, or None; it gives a `QFormerOutput`. Its
    attributes ``hidden_size``, ``num_attention_heads`` and ``num_cross_attention_layers`` say how wide it is, and what
    the prefix is for.

    Raises:
        ValueError: if the name is taken, listing what there is.
    """
    return CONNECTORS.register(name)
