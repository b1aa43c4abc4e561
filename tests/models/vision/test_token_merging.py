"""Visual tokens that are alike become one."""

import pytest
import torch

from lavis_kvmod.models.settings import ModelSettings, SettingsError
from lavis_kvmod.models.vision.token_merging import merge_tokens


def of(*numbers):
    """Tokens (1, n, 8), equal where the numbers are."""
    return torch.randn(100, 8, generator=torch.Generator().manual_seed(0))[list(numbers)].unsqueeze(0)


def test_equal_tokens_are_merged_first_and_keep_their_order():
    merged, sizes = merge_tokens(of(0, 1, 2, 2, 3, 4), 5)  # no class token: 6 is no square, nor is 5
    torch.testing.assert_close(merged, of(0, 1, 2, 3, 4))
    assert sizes.tolist() == [[1, 1, 2, 1, 1]]
    merged, sizes = merge_tokens(of(0, *[1] * 8, *[2] * 8), 3)  # a class token, and a 4 x 4 of two halves
    torch.testing.assert_close(merged, of(0, 1, 2))
    assert sizes.tolist() == [[1, 8, 8]]


@pytest.mark.parametrize("keep", [2, 3, 5, 9, 16, 17])
def test_sizes_add_up_and_weigh_the_means(keep):
    tokens = torch.randn(3, 17, 8, dtype=torch.float64).to(torch.bfloat16)
    merged, sizes = merge_tokens(tokens, keep)
    assert merged.shape == (3, keep, 8) and merged.dtype == torch.bfloat16
    assert sizes.sum(1).tolist() == [17.0] * 3 and sizes.min() >= 1
    torch.testing.assert_close(merged[:, 0], tokens[:, 0])  # the class token, by itself
    total = (merged.float() * sizes.unsqueeze(-1)).sum(1)
    torch.testing.assert_close(total, tokens.float().sum(1), atol=0.2, rtol=0.02)
    torch.testing.assert_close(merge_tokens(tokens[1:2], keep)[0], merged[1:2])  # whatever its company
    if keep == 17:
        assert torch.equal(merged, tokens)


@pytest.mark.parametrize("more", [{}, dict(connector="linear", pretrained=None), dict(max_images=2)])
def test_a_model_trains_and_answers_with_fewer_tokens(build, vqa_batch, more):
    model = build(merge_visual_tokens=3, **more)
    assert model(vqa_batch)["loss"].isfinite()
    assert model.eval().frozen_features(vqa_batch).visual_tokens.shape[1] == 3
    soft = model.encode(vqa_batch).soft_prompt
    assert soft.shape[1] == model.num_soft_prompt == (4 if "connector" in more else 5)
    assert len(model.predict_answers(vqa_batch, num_beams=2)) == 2
    with pytest.raises(ValueError, match="merged visual tokens have no places in the image"):
        model.attention_maps(vqa_batch)


@pytest.mark.parametrize(
    "more, told",
    [
        (
            dict(connector="c_abstractor"),
            "merge_visual_tokens: connector c_abstractor takes the visual tokens as a",
        ),
        (dict(pool_visual_tokens=2), "pool_visual_tokens: merge_visual_tokens leaves fewer tokens, too; take one"),
        (dict(merge_visual_tokens=300), "merge_visual_tokens: expected 2 to 257, the visual tokens there are, got 300"),
        (dict(merge_visual_tokens=1), "merge_visual_tokens: expected 2 to 257"),
    ],
)
def test_what_cannot_be_merged_is_told_before_anything_is_built(more, told):
    with pytest.raises(SettingsError, match=told):
        ModelSettings.from_config({"load_finetuned": False, "merge_visual_tokens": 64, **more})


def test_one_vector_a_token_counts_the_merged_ones():
    settings = ModelSettings.from_config(dict(load_finetuned=False, connector="linear", merge_visual_tokens=64))
    assert settings.num_soft_prompt() == 64 + 1  # and the second encoder's token
