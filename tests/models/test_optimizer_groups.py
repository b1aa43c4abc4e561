"""Weight decay and learning-rate multipliers by part."""

import pytest

GATED = dict(prefix_gate="tanh")


def by_name(model, **options):
    """Parameter name -> its group."""
    groups = model.get_optimizer_params(0.05, **options)
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group for group in groups for p in group["params"]}


@pytest.mark.parametrize("freeze_vit", [True, False])
def test_every_trained_parameter_once(build, freeze_vit):
    model = build(freeze_vit=freeze_vit, **GATED)
    groups = model.get_optimizer_params(0.05)
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert len({group["name"] for group in groups}) == len(groups)


def test_no_decay_for_biases_norms_prefix_tokens_and_gates(build):
    groups = by_name(build(freeze_vit=False, **GATED))
    exempt = {name for name, group in groups.items() if group["weight_decay"] == 0}
    for name in groups:
        is_norm = ".norm" in name or "LayerNorm" in name or name.startswith("ln_vision")
        by_kind = name.endswith("bias") or is_norm or name in ("kv_prefix.prefix_tokens", "kv_gate")
        assert (name in exempt) == by_kind, name
    assert {groups[name]["weight_decay"] for name in groups if name not in exempt} == {0.05}
    assert "query_tokens" not in exempt and "opt_proj.weight" not in exempt


def test_learning_rate_multipliers(build):
    groups = by_name(build(freeze_vit=False, **GATED), kv_lr_scale=10.0, lr_scale=0.5)
    scales = {name: group["lr_scale"] for name, group in groups.items()}
    for name, scale in scales.items():
        if name.startswith("kv_"):
            assert scale == 10.0, name
        elif not name.startswith("visual_encoder."):
            assert scale == 1.0, name
    # the small ViT has two blocks: embeddings, block 0, block 1
    assert scales["visual_encoder.pos_embed"] == scales["visual_encoder.patch_embed.proj.weight"] == 0.5**3
    assert scales["visual_encoder.blocks.0.attn.qkv.weight"] == 0.5**2
    assert scales["visual_encoder.blocks.1.mlp.fc1.bias"] == 0.5
