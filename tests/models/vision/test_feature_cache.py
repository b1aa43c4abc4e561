"""What the frozen encoders said is kept in the tower's precision, and no more of it than is allowed."""

import logging

import pytest
import torch

from lavis_kvmod.models.settings import ModelSettings, SettingsError
from lavis_kvmod.models.vision.feature_cache import FrozenFeatureCache, FrozenFeatures

KIB = 2**10


def encoded(image):
    """Tokens of 1 KiB an image, that tell which image it is."""
    return FrozenFeatures(image.flatten(1)[:, :1].repeat(1, 256).unsqueeze(-1), None)


@pytest.fixture()
def pictures():
    return torch.arange(6.0).view(6, 1, 1, 1)


def test_a_full_cache_keeps_what_it_has_and_says_so_once(pictures, caplog):
    cache, asked = FrozenFeatureCache(max_gib=4 * KIB / 2**30), []

    def counted(image):
        asked.append(sorted({int(value) for value in image.flatten()}))
        return encoded(image)

    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            found = cache(list("abcdef"), pictures, counted)
            assert torch.equal(found.visual_tokens, encoded(pictures).visual_tokens)
    assert asked == [[0, 1, 2, 3, 4, 5], [4, 5], [4, 5]]
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith("the features of 4 images fill model.feature_cache_gib: 3.8147e-06; further images")
    cache.clear()
    cache(list("ef"), pictures[4:], counted)
    cache(list("ef"), pictures[4:], counted)
    assert asked[3:] == [[4, 5]]  # there is room again


@pytest.mark.parametrize("value", [0, -1, True, "4 GB"])
def test_the_bound_is_a_number(value):
    with pytest.raises(SettingsError, match="feature_cache_gib: expected a number above 0"):
        ModelSettings.from_config({"load_finetuned": False, "feature_cache_gib": value})
