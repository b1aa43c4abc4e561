"""The Q-Former of BLIP-2 (arXiv 2301.12597), with a Key/Value prefix in its cross-attention.

Parameter names are those of LAVIS's ``BertLMHeadModel`` (``lavis/models/blip2_models/Qformer.py``), so that its
checkpoints load key by key. The architecture is BERT's, with cross-attention to the image in every other layer and
a feed-forward of its own for the query tokens. The text side (word embeddings, text feed-forward, causal masks) is
built only where asked for: the OPT path runs on query tokens alone.
"""

from dataclasses import dataclass
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_kvmod.models.connectors.attention import attend_with
from lavis_kvmod.models.connectors.kv_prefix import KeyProjection, KVPrefix
from lavis_kvmod.models.connectors.registry import ConnectorSizes, NoSizes, register_connector
from lavis_kvmod.models.connectors.word_head import WordHead

KeyValue = Tuple[Tensor, Tensor]

# What LAVIS adds to the scores of masked self-attention positions; its Q-Former keeps BERT's number.
MASKED_SCORE = -10000.0


@dataclass
class QFormerOutput:
    """Hidden states (b, q + t, hidden); Keys/Values per layer if asked for; attention maps per layer if asked for.

    ``cross_attentions`` holds one (b, h, q, p + n) map for each cross-attention layer; the first ``p`` columns are
    the prefix positions. With a gate the two parts are separate softmaxes, the prefix part scaled by the gate.
    """

    last_hidden_state: Tensor
    past_key_values: Optional[List[KeyValue]] = None
    self_attentions: Optional[List[Tensor]] = None
    cross_attentions: Optional[List[Tensor]] = None


class MultiHeadAttention(nn.Module):
    """Query, Key and Value projections and the attention over them (BERT's ``attention.self``)."""

    def __init__(self, *, hidden_size: int, num_heads: int, kv_width: int, dropout: float, bias: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.key = KeyProjection(kv_width, hidden_size, bias=bias)
        self.value = nn.Linear(kv_width, hidden_size, bias=bias)

    def forward(
        self,
        hidden_states: Tensor,
        context: Tensor,
        mask: Optional[Tensor] = None,
        prefix: Optional[KVPrefix] = None,
        past: Optional[KeyValue] = None,
        output_attentions: bool = False,
    ) -> Tuple[Tensor, Optional[Tensor], KeyValue]:
        """hidden_states (b, q, hidden) attends to context (b, n, kv_width) -> (b, q, hidden), map, (K, V).

        ``mask`` is additive, broadcastable to (b, h, q, n), and says nothing of prefix positions: see
        `lavis_kvmod.models.connectors.attention`. ``past`` are Keys/Values (b, h, m, d) of earlier positions of the
        context.
        """
        in_one_softmax = prefix is not None and prefix.gate is None
        q = self._split_heads(self.query(hidden_states))
        k = self._split_heads(self.key(context, bias_counts=in_one_softmax))
        v = self._split_heads(self.value(context))
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        dropout = self.dropout if self.training else 0.0
        out, probs = attend_with(prefix, q, k, v, mask, dropout=dropout, maps=output_attentions)
        b, h, n_q, d = out.shape
        return out.transpose(1, 2).reshape(b, n_q, h * d), probs, (k, v)

    def _split_heads(self, x: Tensor) -> Tensor:
        """(b, n, h * d) -> (b, h, n, d)"""
        b, n, _ = x.shape
        return x.view(b, n, self.num_heads, -1).transpose(1, 2)


class ResidualOutput(nn.Module):
    """Projection, dropout, residual, LayerNorm (BERT's ``output`` blocks)."""

    def __init__(self, *, in_width: int, hidden_size: int, dropout: float, layer_norm_eps: float):
        super().__init__()
        self.dense = nn.Linear(in_width, hidden_size)
        self.LayerNorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """(…, in_width), (…, hidden) -> (…, hidden)"""
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class AttentionBlock(nn.Module):
    """Attention and its output projection; ``self`` and ``output`` are the names in BLIP-2's checkpoints."""

    def __init__(self, *, hidden_size: int, num_heads: int, kv_width: int, dropout: float, layer_norm_eps: float):
        super().__init__()
        self.self = MultiHeadAttention(hidden_size=hidden_size, num_heads=num_heads, kv_width=kv_width, dropout=dropout)
        self.output = ResidualOutput(
            in_width=hidden_size,
            hidden_size=hidden_size,
            dropout=dropout,
            layer_norm_eps=layer_norm_eps,
        )

    def forward(
        self, hidden_states: Tensor, context: Tensor, mask: Optional[Tensor] = None, **attention: Any
    ) -> Tuple[Tensor, Optional[Tensor], KeyValue]:
        """As `MultiHeadAttention.forward`, with the residual and its norm."""
        attended, probs, key_value = self.self(hidden_states, context, mask, **attention)
        return self.output(attended, hidden_states), probs, key_value


class Intermediate(nn.Module):
    """The widening half of a feed-forward (BERT's ``intermediate``)."""

    def __init__(self, *, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.dense = nn.Linear(hidden_size, intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        """(…, hidden) -> (…, intermediate)"""
        return F.gelu(self.dense(x))


class LayerTrace(NamedTuple):
    """What a layer leaves beside its hidden states: Keys and Values of the self-attention; the two attention maps where
    they are asked for (and there is cross-attention)."""

    key_value: KeyValue
    self_probs: Optional[Tensor]
    cross_probs: Optional[Tensor]


class QFormerLayer(nn.Module):
    """Self-attention over queries and text; cross-attention (every other layer) and feed-forward for the queries;
    a feed-forward of its own for the text."""

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        encoder_width: Optional[int],
        dropout: float,
        layer_norm_eps: float,
        with_text: bool,
    ):
        super().__init__()
        norms: Dict[str, Any] = dict(hidden_size=hidden_size, dropout=dropout, layer_norm_eps=layer_norm_eps)
        self.attention = AttentionBlock(kv_width=hidden_size, num_heads=num_heads, **norms)
        self.has_cross_attention = encoder_width is not None
        if encoder_width is not None:
            self.crossattention = AttentionBlock(kv_width=encoder_width, num_heads=num_heads, **norms)
        widen = dict(hidden_size=hidden_size, intermediate_size=intermediate_size)
        narrow: Dict[str, Any] = dict(in_width=intermediate_size, **norms)
        if with_text:
            self.intermediate = Intermediate(**widen)
            self.output = ResidualOutput(**narrow)
        self.intermediate_query = Intermediate(**widen)
        self.output_query = ResidualOutput(**narrow)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        num_queries: int,
        self_mask: Optional[Tensor],
        visual_tokens: Optional[Tensor],
        visual_mask: Optional[Tensor],
        prefix: Optional[KVPrefix],
        past: Optional[KeyValue],
        output_attentions: bool,
    ) -> Tuple[Tensor, LayerTrace]:
        """(b, q + t, hidden) -> the same shape, and what the layer leaves beside it."""
        hidden_states, self_probs, key_value = self.attention(
            hidden_states,
            hidden_states,
            self_mask,
            past=past,
            output_attentions=output_attentions,
        )
        queries, text = hidden_states[:, :num_queries], hidden_states[:, num_queries:]
        cross_probs = None
        outputs = []
        if num_queries:
            if self.has_cross_attention:
                queries, cross_probs, _ = self.crossattention(
                    queries,
                    visual_tokens,
                    visual_mask,
                    prefix=prefix,
                    output_attentions=output_attentions,
                )
            outputs.append(self.output_query(self.intermediate_query(queries), queries))
        if text.shape[1]:
            outputs.append(self.output(self.intermediate(text), text))
        return torch.cat(outputs, dim=1), LayerTrace(key_value, self_probs, cross_probs)


class QFormerEmbeddings(nn.Module):
    """Query tokens as they are, in front of embedded text; one LayerNorm over both."""

    position_ids: Tensor

    def __init__(
        self,
        *,
        hidden_size: int,
        vocab_size: Optional[int],
        max_position_embeddings: int,
        dropout: float,
        layer_norm_eps: float,
    ):
        super().__init__()
        if vocab_size:
            self.word_embeddings = nn.Embedding(vocab_size, hidden_size, padding_idx=0)
            self.position_embeddings = nn.Embedding(max_position_embeddings, hidden_size)
        self.LayerNorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.dropout = nn.Dropout(dropout)
        # LAVIS's checkpoints carry this buffer, so it is kept though the query path never reads it.
        self.register_buffer("position_ids", torch.arange(max_position_embeddings).expand(1, -1))

    def forward(self, query_embeds: Optional[Tensor], input_ids: Optional[Tensor], past_length: int) -> Tensor:
        """(b, q, hidden) and/or (b, t) -> (b, q + t, hidden)"""
        parts = [] if query_embeds is None else [query_embeds]
        if input_ids is not None:
            positions = self.position_ids[:, past_length : past_length + input_ids.shape[1]]
            parts.append(self.word_embeddings(input_ids) + self.position_embeddings(positions))
        return self.dropout(self.LayerNorm(torch.cat(parts, dim=1)))


class QFormerEncoder(nn.Module):
    """The stack of layers; the list is called ``layer`` in BLIP-2's checkpoints."""

    def __init__(self, layers: Sequence[QFormerLayer]):
        super().__init__()
        self.layer = nn.ModuleList(layers)


class QFormerModel(nn.Module):
    """Embeddings and layers (``Qformer.bert`` in BLIP-2's checkpoints)."""

    def __init__(self, *, embeddings: QFormerEmbeddings, encoder: QFormerEncoder, num_queries: int):
        super().__init__()
        self.embeddings = embeddings
        self.encoder = encoder
        self.num_queries = num_queries

    def forward(
        self,
        query_embeds: Optional[Tensor] = None,
        input_ids: Optional[Tensor] = None,
        attention_mask: Optional[Tensor] = None,
        encoder_hidden_states: Optional[Tensor] = None,
        encoder_attention_mask: Optional[Tensor] = None,
        prefix: Optional[Sequence[KVPrefix]] = None,
        past_key_values: Optional[Sequence[KeyValue]] = None,
        is_decoder: bool = False,
        use_cache: bool = False,
        output_attentions: bool = False,
        queries_only: bool = False,
    ) -> QFormerOutput:
        """Run queries (b, q, hidden) and/or text (b, t) over visual tokens (b, n, width).

        Args:
            query_embeds: query tokens; only they see the image.
            input_ids: text tokens, needs a Q-Former built with its text side.
            attention_mask: 1 for visible, 0 for masked, (b, q + t) with the past in front, or (b, q + t, q + t).
            encoder_hidden_states, encoder_attention_mask: visual tokens; (b, n), 1 for visible, None sees all.
            prefix: one `KVPrefix` for each cross-attention layer, in order; None is stock BLIP-2.
            past_key_values: one (K, V) a layer, as returned with ``use_cache``: the queries' (and earlier text's).
            is_decoder: text sees the queries and earlier text, queries see each other (UniLM's mask).
            queries_only: give the queries' hidden states (b, q, hidden) alone.

        Raises:
            ValueError: without any input, or if the number of prefixes is not that of cross-attention layers.
        """
        self._check(query_embeds, input_ids, prefix)
        past_positions = past_key_values[0][0].shape[2] if past_key_values else 0
        # Past text positions continue the numbering; the queries among them have none.
        hidden_states = self.embeddings(query_embeds, input_ids, max(past_positions - self.num_queries, 0))
        num_queries = 0 if query_embeds is None else query_embeds.shape[1]
        num_text = 0 if input_ids is None else input_ids.shape[1]
        masks = dict(
            self_mask=self_attention_mask(
                attention_mask,
                num_queries=num_queries,
                num_text=num_text,
                num_past=past_positions,
                causal=is_decoder,
                like=hidden_states,
            ),
            visual_mask=visual_attention_mask(encoder_attention_mask, like=hidden_states),
        )
        prefixes = iter(prefix or ())
        traces: List[LayerTrace] = []
        for i, layer in enumerate(self.encoder.layer):
            hidden_states, trace = layer(
                hidden_states,
                num_queries=num_queries,
                visual_tokens=encoder_hidden_states,
                prefix=next(prefixes, None) if layer.has_cross_attention else None,
                past=past_key_values[i] if past_key_values else None,
                output_attentions=output_attentions,
                **masks,
            )
            traces.append(trace)
        return _output(hidden_states[:, : num_queries if queries_only else None], traces, use_cache, output_attentions)

    def _check(
        self, query_embeds: Optional[Tensor], input_ids: Optional[Tensor], prefix: Optional[Sequence[KVPrefix]]
    ) -> None:
        if query_embeds is None and input_ids is None:
            raise ValueError("the Q-Former needs query_embeds, input_ids or both; got neither")
        if input_ids is not None and not hasattr(self.embeddings, "word_embeddings"):
            raise ValueError("this Q-Former has no text side: build it with vocab_size to pass input_ids")
        num_cross = sum(bool(layer.has_cross_attention) for layer in self.encoder.layer)
        if prefix is not None and len(prefix) != num_cross:
            raise ValueError(f"expected one prefix for each of {num_cross} cross-attention layers, got {len(prefix)}")


def _output(
    hidden_states: Tensor, traces: Sequence[LayerTrace], use_cache: bool, output_attentions: bool
) -> QFormerOutput:
    output = QFormerOutput(hidden_states)
    if use_cache:
        output.past_key_values = [trace.key_value for trace in traces]
    if output_attentions:
        output.self_attentions = [trace.self_probs for trace in traces if trace.self_probs is not None]
        output.cross_attentions = [trace.cross_probs for trace in traces if trace.cross_probs is not None]
    return output


def visual_attention_mask(visible: Optional[Tensor], like: Tensor) -> Optional[Tensor]:
    """The additive mask (b, 1, 1, n) of visual tokens that are seen (1) or not (0) (b, n); None where all are."""
    if visible is None:
        return None
    hidden = 1.0 - visible[:, None, None, :].to(like.dtype)
    return hidden * torch.finfo(like.dtype).min


def self_attention_mask(
    attention_mask: Optional[Tensor],
    *,
    num_queries: int,
    num_text: int,
    num_past: int,
    causal: bool,
    like: Tensor,
) -> Optional[Tensor]:
    """The additive mask (b, 1, q + t, past + q + t) of BLIP-2's objectives, or None where nothing is masked.

    Without ``causal`` every position sees every unmasked one. With it, text sees the past, the queries and earlier
    text, and queries see only queries.
    """
    if attention_mask is None and not causal:
        return None
    if attention_mask is not None and attention_mask.ndim == 3:
        visible = attention_mask[:, None]
    else:
        total = num_past + num_queries + num_text
        if attention_mask is None:
            attention_mask = like.new_ones(like.shape[0], total)
        visible = attention_mask[:, None, None, :]  # (b, 1, 1, total)
        if causal:
            rows = torch.ones(num_queries + num_text, total, device=like.device)
            rows[:num_queries, num_past + num_queries :] = 0  # queries do not see text
            rows[num_queries:, num_past + num_queries :].tril_()  # text does not see later text
            visible = visible * rows
    return (1.0 - visible.to(like.dtype)) * MASKED_SCORE


class QFormer(nn.Module):
    """BLIP-2's Q-Former.

    The defaults are the published geometry (BERT-base with cross-attention in every second layer). It starts from
    random weights as BERT does (normal, 0.02): a BLIP-2 checkpoint replaces all of them, so no BERT weights are
    fetched first.

    Args:
        encoder_width: width of the visual tokens (1408 for EVA-CLIP-G).
        num_queries: number of query tokens (positions without a text position).
        cross_attention_freq: every how many layers, from layer 0, the queries attend to the image.
        vocab_size: None for query tokens alone (the OPT path); BLIP-2's 30523 builds the text side too.
        word_head: also build ``cls``, from hidden states to words (stage 1); needs the text side.
    """

    def __init__(
        self,
        *,
        encoder_width: int,
        num_queries: int = 32,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        cross_attention_freq: int = 2,
        dropout: float = 0.1,
        layer_norm_eps: float = 1e-12,
        max_position_embeddings: int = 512,
        vocab_size: Optional[int] = None,
        word_head: bool = False,
    ):
        super().__init__()
        if hidden_size % num_attention_heads:
            raise ValueError(
                "the Q-Former's hidden_size must be a multiple of num_attention_heads, "
                f"got {hidden_size} and {num_attention_heads}"
            )
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        layers = [
            QFormerLayer(
                hidden_size=hidden_size,
                num_heads=num_attention_heads,
                intermediate_size=intermediate_size,
                encoder_width=encoder_width if i % cross_attention_freq == 0 else None,
                dropout=dropout,
                layer_norm_eps=layer_norm_eps,
                with_text=vocab_size is not None,
            )
            for i in range(num_hidden_layers)
        ]
        self.num_cross_attention_layers = sum(layer.has_cross_attention for layer in layers)
        self.bert = QFormerModel(
            embeddings=QFormerEmbeddings(
                hidden_size=hidden_size,
                vocab_size=vocab_size,
                max_position_embeddings=max_position_embeddings,
                dropout=dropout,
                layer_norm_eps=layer_norm_eps,
            ),
            encoder=QFormerEncoder(layers),
            num_queries=num_queries,
        )
        if word_head:
            self.cls = WordHead(self.bert.embeddings.word_embeddings, layer_norm_eps=layer_norm_eps)
        self.apply(_init_as_bert)

    def forward(self, *args: Any, **kwargs: Any) -> QFormerOutput:
        """See `QFormerModel.forward`."""
        return self.bert(*args, **kwargs)


@register_connector("qformer", geometry=NoSizes)
def build_qformer(settings: Any, sizes: ConnectorSizes) -> QFormer:
    """BLIP-2's Q-Former, the default (arXiv 2301.12597)."""
    return QFormer(
        encoder_width=sizes.visual_width,
        num_queries=sizes.num_queries,
        vocab_size=sizes.vocab_size,
        word_head=sizes.word_head,
        **settings.qformer_geometry,
    )


def _init_as_bert(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
