"""The connectors by name, and how to add one: what makes a soft prompt of visual tokens."""

from dataclasses import dataclass
from typing import Any, Callable, List, Mapping, NamedTuple, Optional, Type

from lavis_kvmod.system.registry import Registry
from lavis_kvmod.system.schema import Settings, not_known

# What a `ConnectorBuilder` gives: a module with the attributes and the `forward` that `register_connector` describes.
Connector = Any


class ConnectorSizes(NamedTuple):
    """What a connector has to fit.

    ``visual_width`` and ``num_visual_tokens`` are those of the visual tokens (None where the image encoder does not
    say how many it gives), ``num_queries`` is ``num_query_token``, ``output_width`` that of the language model's
    embeddings. For a text side of its own, ``vocab_size`` is the size of the vocabulary, and ``word_head`` asks for
    words out of it too. ``geometry`` is the run file's ``connector_geometry``.
    """

    visual_width: int
    num_queries: int
    vocab_size: Optional[int] = None
    num_visual_tokens: Optional[int] = None
    output_width: Optional[int] = None
    geometry: Mapping[str, Any] = {}
    word_head: bool = False


class NoSizes(Settings):
    """Of a connector whose sizes follow from those of the models on both sides, or that has a key of its own."""


ConnectorBuilder = Callable[[Any, ConnectorSizes], Connector]


@dataclass(frozen=True)
class ConnectorKind:
    """How one ``model.connector`` is built, and what a run file may say of it: see `register_connector`."""

    build: ConnectorBuilder
    attends: bool = True
    one_a_token: bool = False
    geometry: Optional[Type[Settings]] = None

    def geometry_problems(self, name: str, given: Mapping[str, Any]) -> List[str]:
        """What is wrong with the ``connector_geometry`` that was given for the connector of this name."""
        if self.geometry is None or not given:
            return []
        known = self.geometry.model_fields
        if not known:
            told = f"connector_geometry: connector {name} takes none (a Q-Former's sizes are qformer_geometry)"
            return [f"{told}; got {', '.join(given)}"]
        problems = [not_known(key, known, f"not a size of connector {name}") for key in given if key not in known]
        return [f"connector_geometry.{told}" for told in [*problems, *self.geometry.check(given)[1]]]


CONNECTORS: Registry[ConnectorKind] = Registry("connector", "connector")


def register_connector(
    name: str, *, attends: bool = True, one_a_token: bool = False, geometry: Optional[Type[Settings]] = None
) -> Callable[[ConnectorBuilder], ConnectorBuilder]:
    """Add a connector: a decorator for the function that builds it from the ``model:`` section and the sizes.

        @register_connector("my-connector")
        def my_connector(settings, sizes) -> nn.Module:
            …

    The module stands where the Q-Former stands (its weights are ``Qformer.*`` in a checkpoint), and is called like it:
    ``forward(query_embeds, encoder_hidden_states, prefix, output_attentions)`` with query tokens (b, q, hidden), visual
    tokens (b, n, width) and one `KVPrefix` for each cross-attention layer, or None; it gives a `QFormerOutput`. Its
    attributes ``hidden_size``, ``num_attention_heads`` and ``num_cross_attention_layers`` say how wide it is, and what
    the prefix is for; behind it a linear layer, ``opt_proj``, brings ``hidden_size`` to the language model's width. It
    may have ``num_outputs`` (vectors an image, by default ``num_query_token``) and ``reads_queries`` (by default true;
    false builds no query tokens).

    Args:
        name: what ``model.connector`` says.
        attends: it has cross-attention to the visual tokens, where a prefix can enter. Otherwise the second encoder's
            features come as tokens of their own (``aux_fusion: tokens``).
        one_a_token: it gives a vector for each visual token, not ``num_query_token`` of them.
        geometry: the sizes that ``connector_geometry`` may name, with their defaults. Without, it may name any.

    Raises:
        ValueError: if the name is taken, listing what there is.
    """

    def register(build: ConnectorBuilder) -> ConnectorBuilder:
        CONNECTORS.register(name, ConnectorKind(build, attends, one_a_token, geometry))
        return build

    return register
