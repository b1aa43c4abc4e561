"""The Q-Former of BLIP-2 (arXiv 2301.12597), with a Key/Value prefix in its cross-attention.

Parameter names are those of LAVIS's ``BertLMHeadModel`` (``lavis/models/blip2_models/Qformer.py``), so that its
checkpoints load key by key. The architecture is BERT's, with cross-attention to the image in every other layer and
a feed-forward of its own for the query tokens. The text side (word embeddings, text feed-forward, causal masks) is
built only where asked for: the OPT path runs on query tokens alone.
"""

import math
from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_kvmod.models.connectors.kv_prefix import KeyProjection, KVPrefix

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

    def __init__(self, *, hidden_size: int, num_heads: int, kv_width: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = KeyProjection(kv_width, hidden_size)
        self.value = nn.Linear(kv_width, hidden_size)

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

        ``mask`` is additive, broadcastable to (b, h, q, n), and says nothing of prefix positions: those are never
        masked. ``past`` are Keys/Values (b, h, m, d) of earlier positions of the context.
        """
        beside_prefix = prefix is not None and prefix.gate is None  # in one softmax
        q = self._split_heads(self.query(hidden_states))
        k = self._split_heads(self.key(context, bias_counts=beside_prefix))
        v = self._split_heads(self.value(context))
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        key_value = (k, v)

        if prefix is None:
            out, probs = self._attend(q, k, v, mask, output_attentions)
        elif beside_prefix:  # one softmax over [prefix | context]
            p = prefix.key.shape[2]
            k = torch.cat([prefix.key.to(k.dtype), k], dim=2)  # (b, h, p + n, d)
            v = torch.cat([prefix.value.to(v.dtype), v], dim=2)
            out, probs = self._attend(q, k, v, _pad_front(mask, p), output_attentions)
        else:  # a softmax of its own for the prefix, added behind a gate: exactly nothing while the gate is 0
            out, probs = self._attend(q, k, v, mask, output_attentions)
            k, v = prefix.key.to(k.dtype), prefix.value.to(v.dtype)
            added, added_probs = self._attend(q, k, v, None, output_attentions, dropout=False)
            gate = prefix.gate.to(out.dtype).view(1, -1, 1, 1)
            out = out + gate * added
            if output_attentions:
                probs = torch.cat([gate * added_probs, probs], dim=-1)

        b, h, n_q, d = out.shape
        return out.transpose(1, 2).reshape(b, n_q, h * d), probs, key_value

    def _split_heads(self, x: Tensor) -> Tensor:
        """(b, n, h * d) -> (b, h, n, d)"""
        b, n, _ = x.shape
        return x.view(b, n, self.num_heads, -1).transpose(1, 2)

    def _attend(self, q, k, v, mask, output_attentions, dropout=True):
        # The gated prefix is attended without dropout: it then draws no random numbers, and a model whose gate is
        # still closed trains exactly as one without a prefix, seed for seed.
        dropout_p = self.dropout if dropout and self.training else 0.0
        if mask is not None:
            mask = mask.to(q.dtype)
        if not output_attentions:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout_p), None
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores + mask
        probs = scores.softmax(dim=-1)
        return F.dropout(probs, dropout_p) @ v, probs


def _pad_front(mask: Optional[Tensor], p: int) -> Optional[Tensor]:
    """Extend an additive mask (…, n) by ``p`` never-masked positions in front: (…, p + n)."""
    return None if mask is None else F.pad(mask, (p, 0), value=0.0)


class ResidualOutput(nn.Module):
    """Projection, dropout, residual, LayerNorm (BERT's ``output`` blocks)."""

    def __init__(self, *, in_width: int, hidden_size: int, dropout: float, layer_norm_eps: float):
        super().__init__()
        self.dense = nn.Linear(in_width, hidden_size)
        self.LayerNorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class AttentionBlock(nn.Module):
    """Attention and its output projection; ``self`` and ``output`` are the names in BLIP-2's checkpoints."""

    def __init__(self, *, hidden_size, num_heads, kv_width, dropout, layer_norm_eps):
        super().__init__()
        self.self = MultiHeadAttention(hidden_size=hidden_size, num_heads=num_heads, kv_width=kv_width, dropout=dropout)
        self.output = ResidualOutput(
            in_width=hidden_size,
            hidden_size=hidden_size,
            dropout=dropout,
            layer_norm_eps=layer_norm_eps,
        )

    def forward(self, hidden_states, context, mask=None, **attention):
        attended, probs, key_value = self.self(hidden_states, context, mask, **attention)
        return self.output(attended, hidden_states), probs, key_value


class Intermediate(nn.Module):
    """The widening half of a feed-forward (BERT's ``intermediate``)."""

    def __init__(self, *, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.dense = nn.Linear(hidden_size, intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


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
        block = dict(
            hidden_size=hidden_size,
            num_heads=num_heads,
            dropout=dropout,
            layer_norm_eps=layer_norm_eps,
        )
        self.attention = AttentionBlock(kv_width=hidden_size, **block)
        self.has_cross_attention = encoder_width is not None
        if self.has_cross_attention:
            self.crossattention = AttentionBlock(kv_width=encoder_width, **block)
        widen = dict(hidden_size=hidden_size, intermediate_size=intermediate_size)
        narrow = dict(
            in_width=intermediate_size,
            hidden_size=hidden_size,
            dropout=dropout,
            layer_norm_eps=layer_norm_eps,
        )
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
    ):
        """(b, q + t, hidden) -> the same shape, self map, cross map or None, (K, V) of the self-attention."""
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
        return torch.cat(outputs, dim=1), self_probs, cross_probs, key_value


class QFormerEmbeddings(nn.Module):
    """Query tokens as they are, in front of embedded text; one LayerNorm over both."""

    def __init__(self, *, hidden_size, vocab_size, max_position_embeddings, dropout, layer_norm_eps):
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
    ) -> QFormerOutput:
        """Run queries (b, q, hidden) and/or text (b, t) over visual tokens (b, n, width).

        Args:
            query_embeds: query tokens; only they see the image.
            input_ids: text tokens, needs a Q-Former built with its text side.
            attention_mask: 1 for visible, 0 for masked, (b, q + t) with the past in front, or (b, q + t, q + t).
            encoder_hidden_states: visual tokens.
            encoder_attention_mask: (b, n), 1 for visible; None sees all.
            prefix: one `KVPrefix` for each cross-attention layer, in order; None is stock BLIP-2.
            past_key_values: one (K, V) a layer, as returned with ``use_cache``: the queries' (and earlier text's).
            is_decoder: text sees the queries and earlier text, queries see each other (UniLM's mask).

        Raises:
            ValueError: without any input, or if the number of prefixes is not that of cross-attention layers.
        """
        if query_embeds is None and input_ids is None:
            raise ValueError("the Q-Former needs query_embeds, input_ids or both; got neither")
        if input_ids is not None and not hasattr(self.embeddings, "word_embeddings"):
            raise ValueError("this Q-Former has no text side: build it with vocab_size to pass input_ids")
        layers = self.encoder.layer
        num_cross = sum(layer.has_cross_attention for layer in layers)
        if prefix is not None and len(prefix) != num_cross:
            raise ValueError(f"expected one prefix for each of {num_cross} cross-attention layers, got {len(prefix)}")

        past_positions = past_key_values[0][0].shape[2] if past_key_values else 0
        # Past text positions continue the numbering; the queries among them have none.
        past_length = max(past_positions - self.num_queries, 0)
        hidden_states = self.embeddings(query_embeds, input_ids, past_length)
        num_queries = 0 if query_embeds is None else query_embeds.shape[1]

        self_mask = self_attention_mask(
            attention_mask,
            num_queries=num_queries,
            num_text=0 if input_ids is None else input_ids.shape[1],
            num_past=past_positions,
            causal=is_decoder,
            like=hidden_states,
        )
        visual_mask = None
        if encoder_attention_mask is not None:
            hidden = 1.0 - encoder_attention_mask[:, None, None, :].to(hidden_states.dtype)
            visual_mask = hidden * torch.finfo(hidden_states.dtype).min

        prefixes = iter(prefix or [None] * num_cross)
        cache, self_maps, cross_maps = [], [], []
        for i, layer in enumerate(layers):
            hidden_states, self_probs, cross_probs, key_value = layer(
                hidden_states,
                num_queries=num_queries,
                self_mask=self_mask,
                visual_tokens=encoder_hidden_states,
                visual_mask=visual_mask,
                prefix=next(prefixes) if layer.has_cross_attention else None,
                past=past_key_values[i] if past_key_values else None,
                output_attentions=output_attentions,
            )
            cache.append(key_value)
            self_maps.append(self_probs)
            if cross_probs is not None:
                cross_maps.append(cross_probs)
        return QFormerOutput(
            last_hidden_state=hidden_states,
            past_key_values=cache if use_cache else None,
            self_attentions=self_maps if output_attentions else None,
            cross_attentions=cross_maps if output_attentions else None,
        )


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
    ):
        super().__init__()
        if hidden_size % num_attention_heads:
            raise ValueError(
                "the Q-Former's hidden_size must be a multiple of num_attention_heads, "
                f"got {hidden_size} and {num_attention_heads}"
            )
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
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
        self.apply(_init_as_bert)

    def forward(self, *args, **kwargs) -> QFormerOutput:
        """See `QFormerModel.forward`."""
        return self.bert(*args, **kwargs)


def _init_as_bert(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
