import pytest
import torch

from lavis_kvmod import KVPrefixGenerator
from lavis_kvmod.models.connectors.attention import attend_with
from lavis_kvmod.models.connectors.kv_prefix import KVPrefix, prefix_generator


def test_shapes_at_published_geometry():
    k, v = KVPrefixGenerator()(torch.randn(2, 1536))
    assert k.shape == v.shape == (2, 12, 8, 64)


def test_parameter_count_at_published_geometry():
    """1536² + 1536 and 1536·768 + 768 (MLP), 8·768 (tokens), 2·(768² + 768) (projections)."""
    assert sum(p.numel() for p in KVPrefixGenerator().parameters()) == 4_728_576


def test_it_is_the_formula_of_the_design():
    generator = KVPrefixGenerator(feature_dim=6, hidden_size=8, num_prefix_tokens=3, num_heads=2)
    features = torch.randn(4, 6)
    k, v = generator(features)
    first, _, second = generator.mlp
    shift = second(torch.nn.functional.gelu(first(features)))
    for b in range(4):
        for p in range(3):
            token = generator.prefix_tokens[p] + shift[b]
            assert torch.allclose(k[b, :, p].reshape(-1), generator.k_proj(token), atol=1e-6)
            assert torch.allclose(v[b, :, p].reshape(-1), generator.v_proj(token), atol=1e-6)


def test_per_layer_gives_each_layer_its_own():
    generator = KVPrefixGenerator(6, 8, 3, 2, num_layers=5)
    k, v = generator(torch.randn(4, 6))
    assert k.shape == v.shape == (5, 4, 2, 3, 4)
    assert not torch.allclose(k[0], k[1])


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="multiple of num_heads"):
        KVPrefixGenerator(hidden_size=10, num_heads=3)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        KVPrefixGenerator(num_prefix_tokens=0)
    with pytest.raises(ValueError, match=r"\(b, 1536\), got \(2, 1280\)"):
        KVPrefixGenerator()(torch.randn(2, 1280))


def test_a_bias_that_all_keys_of_a_softmax_share_gets_an_exact_zero():
    """Not rounding, of which AdamW would make whole steps; and the Keys are the same."""
    generator = KVPrefixGenerator(6, 8, 3, 2)
    features, query, others = torch.randn(4, 6), torch.randn(4, 2, 5, 4), torch.randn(4, 2, 7, 4)
    (k, v), (k_alone, v_alone) = generator(features), generator(features, own_softmax=True)
    assert torch.equal(k, k_alone) and torch.equal(v, v_alone)

    def gradient(k, v):
        generator.zero_grad()
        torch.nn.functional.scaled_dot_product_attention(query, k, v).square().sum().backward()
        assert generator.v_proj.bias.grad.any() and generator.k_proj.weight.grad.any()
        return generator.k_proj.bias.grad

    assert not gradient(k_alone, v_alone).any()
    assert gradient(torch.cat([k, others], dim=2), torch.cat([v, others], dim=2)).abs().max() > 1e-4


@pytest.mark.parametrize("gate", [None, torch.tensor([0.4, -0.7])])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("maps", [False, True])
def test_a_sample_whose_prefix_is_dropped_attends_as_without_one(gate, masked, maps):
    q, k, v = torch.randn(3, 2, 5, 4), torch.randn(3, 2, 7, 4), torch.randn(3, 2, 7, 4)
    prefix = KVPrefix(torch.randn(3, 2, 6, 4), torch.randn(3, 2, 6, 4), gate)
    mask = torch.randn(3, 1, 1, 7) if masked else None
    dropped = torch.tensor([False, True, False])
    told = attend_with(prefix._replace(dropped=dropped), q, k, v, mask, maps=maps)
    with_prefix, without = attend_with(prefix, q, k, v, mask, maps=maps), attend_with(None, q, k, v, mask, maps=maps)
    assert torch.allclose(told.values[~dropped], with_prefix.values[~dropped], atol=1e-6)
    assert torch.allclose(told.values[dropped], without.values[dropped], atol=1e-6)
    assert not torch.allclose(with_prefix.values[dropped], without.values[dropped], atol=1e-3)
    if maps:
        assert not told.probs[dropped][..., :6].any()
        assert torch.allclose(told.probs[dropped][..., 6:], without.probs[dropped], atol=1e-6)


def test_a_grid_gives_a_token_a_cell_with_its_position():
    generator = KVPrefixGenerator(6, 8, 4, 2, grid=True)
    features = torch.randn(3, 4, 6)
    k, v = generator(features)
    assert k.shape == v.shape == (3, 2, 4, 4) and not hasattr(generator, "prefix_tokens")
    for b, cell in ((0, 0), (2, 3)):
        token = generator.mlp(features[b, cell]) + generator.position_embeddings[cell]
        assert torch.allclose(k[b, :, cell].flatten(), generator.k_proj(token), atol=1e-6)
        assert torch.allclose(v[b, :, cell].flatten(), generator.v_proj(token), atol=1e-6)
    assert generator.num_positions == 4
    with pytest.raises(ValueError, match=r"expected features of a grid \(b, 4, 6\), got \(3, 6\)"):
        generator(features[:, 0])
    with pytest.raises(ValueError, match=r"expected pooled features \(b, 6\), got \(3, 4, 6\)"):
        KVPrefixGenerator(6, 8, 4, 2)(features)


@pytest.mark.parametrize("layers", [None, 3])
def test_several_encoders_write_a_prefix_each_one_behind_the_other(layers):
    both = prefix_generator([6, 5], hidden_size=8, num_prefix_tokens=3, num_heads=2, num_layers=layers)
    first, second = torch.randn(4, 6), torch.randn(4, 5)
    k, v = both(torch.cat([first, second], dim=1))
    expected = both.of[0](first), both.of[1](second)
    for got, side in ((k, 0), (v, 1)):
        assert torch.allclose(got, torch.cat([one[side] for one in expected], dim=-2), atol=1e-6)
    assert k.shape[-2:] == (6, 4) and both.num_positions == 6
    assert isinstance(prefix_generator([6], hidden_size=8, num_heads=2), KVPrefixGenerator)
    with pytest.raises(ValueError, match=r"expected features \(b, …, 11\) of 2 encoders, got \(4, 6\)"):
        both(first)


def test_prefixes_are_dropped_in_training_alone_and_all_parameters_get_gradients(build, vqa_batch, images):
    model = build(prefix_dropout=0.5)
    pooled = model.aux_encoder(images(2)).repeat(100, 1)
    torch.manual_seed(0)
    dropped = model.train().prefixes(pooled)[0].dropped
    assert 70 < dropped.sum() < 130
    assert model.eval().prefixes(pooled)[0].dropped is None and build().train().prefixes(pooled)[0].dropped is None
    model.train()({**vqa_batch})["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
