"""Our Q-Former against LAVIS's BertLMHeadModel, the real class, on the same weights, in every mode LAVIS runs it."""

import pytest
import torch
from lavis.models.blip2_models.Qformer import BertConfig, BertLMHeadModel

from lavis_kvmod.models.connectors.kv_prefix import KVPrefix
from lavis_kvmod.models.connectors.qformer import QFormer

GEOMETRY = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64)
B, N, Q, T, WIDTH, VOCAB = 3, 7, 5, 6, 24, 50


@pytest.fixture(scope="module")
def pair():
    """(LAVIS's Q-Former, ours with the same weights), in eval mode."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=VOCAB, **GEOMETRY)
    config.encoder_width = WIDTH
    config.add_cross_attention = True
    config.cross_attention_freq = 2
    config.query_length = Q
    stock = BertLMHeadModel(config).eval()
    with torch.no_grad():  # far from the tiny initial weights, so that a wrong mask or scale shows
        for parameter in stock.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    ours = QFormer(encoder_width=WIDTH, num_queries=Q, vocab_size=VOCAB, **GEOMETRY).eval()
    stock_bert = {f"bert.{k}": v for k, v in stock.bert.state_dict().items()}
    ours.load_state_dict(stock_bert, strict=True)
    return stock, ours


@pytest.fixture()
def inputs():
    g = torch.Generator().manual_seed(1)
    return dict(
        query_embeds=torch.randn(B, Q, GEOMETRY["hidden_size"], generator=g),
        input_ids=torch.randint(1, VOCAB, (B, T), generator=g),
        encoder_hidden_states=torch.randn(B, N, WIDTH, generator=g),
    )


def padded_text(extra=0):
    """Attention mask (B, extra + T): everything in front visible, the texts of different lengths."""
    mask = torch.ones(B, extra + T, dtype=torch.long)
    mask[1, -2:] = 0
    mask[2, -4:] = 0
    return mask


def assert_close(ours, stock):
    assert (ours - stock).abs().max() <= 1e-5


def test_queries_alone(pair, inputs):
    stock, ours = pair
    del inputs["input_ids"]
    visible = torch.ones(B, N)
    visible[1, 4:] = 0
    for mask in (None, visible):
        expected = stock.bert(**inputs, encoder_attention_mask=mask, return_dict=True)
        got = ours(**inputs, encoder_attention_mask=mask)
        assert_close(got.last_hidden_state, expected.last_hidden_state)


@pytest.mark.parametrize("is_decoder", [False, True], ids=["bidirectional", "causal"])
def test_text_alone_and_padded(pair, inputs, is_decoder):
    stock, ours = pair
    ids = inputs["input_ids"]
    mask = padded_text()
    expected = stock.bert(ids, attention_mask=mask, is_decoder=is_decoder, return_dict=True)
    got = ours(input_ids=ids, attention_mask=mask, is_decoder=is_decoder)
    assert_close(got.last_hidden_state, expected.last_hidden_state)
    unpadded = ours(input_ids=ids, is_decoder=is_decoder).last_hidden_state
    assert not torch.allclose(got.last_hidden_state, unpadded, atol=1e-3)


@pytest.mark.parametrize("is_decoder", [False, True], ids=["bidirectional", "causal"])
def test_queries_and_text(pair, inputs, is_decoder):
    stock, ours = pair
    mask = padded_text(extra=Q)
    expected = stock.bert(**inputs, attention_mask=mask, is_decoder=is_decoder, return_dict=True)
    got = ours(**inputs, attention_mask=mask, is_decoder=is_decoder)
    assert_close(got.last_hidden_state, expected.last_hidden_state)


def test_unimodal_mask(pair, inputs):
    """A mask of its own for each pair of positions: queries and text that do not see each other."""
    stock, ours = pair
    mask = torch.zeros(B, Q + T, Q + T)
    mask[:, :Q, :Q] = 1
    mask[:, Q:, Q:] = 1
    expected = stock.bert(**inputs, attention_mask=mask, return_dict=True)
    got = ours(**inputs, attention_mask=mask)
    assert_close(got.last_hidden_state, expected.last_hidden_state)


def test_text_behind_cached_queries(pair, inputs):
    """Captioning: the queries run once, their Keys/Values stand in front of the text."""
    stock, ours = pair
    ids = inputs.pop("input_ids")
    past_stock = stock.bert(**inputs, use_cache=True, return_dict=True).past_key_values
    past_ours = ours(**inputs, use_cache=True).past_key_values
    mask = padded_text(extra=Q)
    expected = stock.bert(ids, attention_mask=mask, past_key_values=past_stock, is_decoder=True, return_dict=True)
    got = ours(input_ids=ids, attention_mask=mask, past_key_values=past_ours, is_decoder=True)
    assert_close(got.last_hidden_state, expected.last_hidden_state)


def test_one_token_at_a_time_behind_queries_and_text(pair, inputs):
    """Generating: each step sees the Keys/Values of the queries and of all tokens before it."""
    stock, ours = pair
    ids = inputs.pop("input_ids")
    past_stock = stock.bert(**inputs, use_cache=True, return_dict=True).past_key_values
    past_ours = ours(**inputs, use_cache=True).past_key_values
    for i in range(T):
        step = dict(input_ids=ids[:, i : i + 1], attention_mask=torch.ones(B, Q + i + 1, dtype=torch.long))
        step.update(is_decoder=True, use_cache=True)
        expected = stock.bert(**step, past_key_values=past_stock, return_dict=True)
        got = ours(**step, past_key_values=past_ours)
        assert_close(got.last_hidden_state, expected.last_hidden_state)
        past_stock, past_ours = expected.past_key_values, got.past_key_values


def test_attention_maps_are_those_of_the_fused_path(pair, inputs):
    stock, ours = pair
    del inputs["input_ids"]
    mapped = ours(**inputs, output_attentions=True)
    fused = ours(**inputs)
    assert_close(mapped.last_hidden_state, fused.last_hidden_state)
    assert fused.cross_attentions is None
    assert [m.shape for m in mapped.cross_attentions] == [(B, 4, Q, N)] * 2
    assert torch.allclose(mapped.cross_attentions[0].sum(-1), torch.ones(B, 4, Q))


def random_prefix(count, gate=None, p=3, heads=4):
    d = GEOMETRY["hidden_size"] // heads
    g = torch.Generator().manual_seed(2)
    key, value = torch.randn(2, B, heads, p, d, generator=g)
    return [KVPrefix(key, value, gate)] * count


def test_prefix_is_attended_beside_the_visual_tokens(pair, inputs):
    """The first p columns of the map are the prefix's, one softmax over all, and masks leave it visible."""
    _, ours = pair
    del inputs["input_ids"]
    none_visible = torch.zeros(B, N)
    out = ours(
        **inputs,
        prefix=random_prefix(2),
        encoder_attention_mask=none_visible,
        output_attentions=True,
    )
    first = out.cross_attentions[0]
    assert first.shape == (B, 4, Q, 3 + N)
    assert torch.allclose(first[..., :3].sum(-1), torch.ones(B, 4, Q))
    plain = ours(**inputs).last_hidden_state
    assert not torch.allclose(ours(**inputs, prefix=random_prefix(2)).last_hidden_state, plain)


@pytest.mark.parametrize("maps", [False, True], ids=["fused", "maps"])
@pytest.mark.parametrize("gate", [None, torch.tensor([0.0, 0.5, -0.5, 0.9])], ids=["one softmax", "gated"])
def test_a_mask_of_the_visual_tokens_is_none_of_the_prefix(pair, inputs, gate, maps):
    """Hidden visual tokens are as good as absent, and the prefix stands as if nothing were hidden."""
    _, ours = pair
    del inputs["input_ids"]
    prefix = dict(prefix=random_prefix(2, gate=gate), output_attentions=maps)
    visible = torch.ones(B, N)
    visible[:, 4:] = 0
    got = ours(**inputs, **prefix, encoder_attention_mask=visible)
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :4]
    expected = ours(**inputs, **prefix)
    assert_close(got.last_hidden_state, expected.last_hidden_state)
    for shown, alone in zip(got.cross_attentions or [], expected.cross_attentions or []):
        assert_close(shown[..., : 3 + 4], alone)
        assert shown[..., 3 + 4 :].abs().max() == 0


def test_concatenating_zeros_is_not_the_identity(pair, inputs):
    """p zero Keys still take softmax mass: why the gate exists."""
    _, ours = pair
    del inputs["input_ids"]
    zeros = [KVPrefix(torch.zeros(B, 4, 3, 8), torch.zeros(B, 4, 3, 8))] * 2
    plain = ours(**inputs).last_hidden_state
    assert not torch.allclose(ours(**inputs, prefix=zeros).last_hidden_state, plain, atol=1e-3)


def test_closed_gate_is_exactly_stock_and_an_open_one_is_not(pair, inputs):
    _, ours = pair
    del inputs["input_ids"]
    plain = ours(**inputs).last_hidden_state
    closed = ours(**inputs, prefix=random_prefix(2, gate=torch.zeros(4))).last_hidden_state
    assert torch.equal(closed, plain)
    one_head = torch.tensor([0.0, 0.5, 0.0, 0.0])
    opened = ours(**inputs, prefix=random_prefix(2, gate=one_head)).last_hidden_state
    assert not torch.allclose(opened, plain, atol=1e-3)


def test_wrong_input_is_refused(pair, inputs):
    _, ours = pair
    with pytest.raises(ValueError, match="got neither"):
        ours()
    with pytest.raises(ValueError, match="each of 2 cross-attention layers, got 1"):
        ours(
            query_embeds=inputs["query_embeds"],
            encoder_hidden_states=inputs["encoder_hidden_states"],
            prefix=random_prefix(1),
        )
    without_text = QFormer(encoder_width=WIDTH, num_queries=Q, **GEOMETRY)
    with pytest.raises(ValueError, match="no text side"):
        without_text(input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match="multiple of num_attention_heads"):
        QFormer(encoder_width=WIDTH, hidden_size=30, num_attention_heads=4)
