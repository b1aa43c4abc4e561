import pytest
import torch

from lavis_kvmod import KVPrefixGenerator


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
