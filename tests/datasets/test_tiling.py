"""Large images as a whole and in tiles."""

import pytest
from lavis.processors.blip_processors import BlipImageEvalProcessor
from omegaconf import OmegaConf
from PIL import Image

from lavis_kvmod.commands.memory import tokens_line
from lavis_kvmod.config.loading import load_config, read_config
from lavis_kvmod.datasets.digits_pages import DigitsPagesBuilder
from lavis_kvmod.datasets.tiling import Tiled
from lavis_kvmod.memory.estimate import estimate
from lavis_kvmod.models.settings import ModelSettings, SettingsError
from lavis_kvmod.system.schema import ConfigurationError
from lavis_kvmod.system.tiles import TilesSettings


@pytest.mark.parametrize(
    "size, grid",
    [((200, 100), (1, 2)), ((100, 200), (2, 1)), ((200, 200), (2, 2)), ((300, 90), (1, 3)), ((90, 300), (3, 1))],
)
def test_the_grid_that_keeps_most_of_an_image(size, grid):
    best = TilesSettings().best_for(*size, side=100)
    assert (best.rows, best.columns) == grid


def test_each_tile_of_each_grid_has_a_place_of_its_own():
    settings = TilesSettings()
    places = [place for grid in settings.chosen_from for place in grid.places]
    assert places == list(range(1, settings.num_places)) and settings.num_places == 15
    assert settings.most_images == 5
    assert TilesSettings.of({"max_tiles": 2}).num_places == 5


def test_tiles_are_the_picture_in_larger():
    picture = Image.new("RGB", (56, 56), "black")
    picture.paste("white", (28, 0, 56, 28))  # the upper right quarter
    tiles = Tiled(BlipImageEvalProcessor(28), TilesSettings(), 28)(picture)
    assert tiles.image.shape == (5, 3, 28, 28)
    brightness = tiles.image.mean((1, 2, 3))
    assert brightness[2] > 1.5 and (brightness[[1, 3, 4]] < -1).all()
    (grid,) = [grid for grid in TilesSettings().chosen_from if (grid.rows, grid.columns) == (2, 2)]
    assert tiles.places.tolist() == [0, *grid.places]


@pytest.fixture()
def pages():
    (defaults,) = OmegaConf.load(DigitsPagesBuilder.default_config_path()).datasets.values()
    small = {stage: {"name": "blip_image_eval", "image_size": 28, "tiles": {}} for stage in ("train", "eval")}
    section = OmegaConf.merge(defaults, {"vis_processor": small, "page_size": 56, "digit_size": 14})
    return DigitsPagesBuilder(section).build()


def test_a_model_sees_the_tiles_of_pages(pages, build):
    data = pages["val"]
    batch = data.collater([data[i] for i in range(2)])
    assert batch["image"].shape == (2, 5, 3, 28, 28) and batch["image_place"].shape == (2, 5)
    assert [len(keys) for keys in batch["image_key"]] == [5, 5] and batch["image_key"][0][1].endswith("#5")
    model = build(tiles={}, cache_frozen_features=True)
    assert model.image_places.visual.shape[0] == 15
    model({**batch, "prompt": "Question: {} Short answer:"})["loss"].backward()
    moved = model.image_places.visual.grad.flatten(1).norm(dim=1) > 0
    assert moved.nonzero().flatten().tolist() == [0, 5, 6, 7, 8]
    with pytest.raises(ValueError, match=r"at most 5 images a sample \(model.tiles\), got 9"):
        build(tiles={"max_tiles": 2}).encode(batch)


@pytest.mark.slow
def test_memory_tells_the_tokens(model_config):
    step = dict(batch_size=2, text_length=8, device="cpu")
    one, five = (estimate(model_config(tiles={}), **step, images=images) for images in (1, 5))
    assert sum(five.activations.values()) > 2 * sum(one.activations.values())
    cfg = read_config("projects/kvmod/vqa.yaml", ["model.tiles={}"])
    (line,) = tokens_line(cfg)
    assert line.startswith("A sample: up to 5 images of 257 visual tokens, 1285 into the connector; 32 soft-prompt")
    (line,) = tokens_line(read_config("projects/kvmod/vqa.yaml", ["model.tiles={}", "model.pool_visual_tokens=2"]))
    assert "images of 65 visual tokens, 325 into the connector" in line
    (line,) = tokens_line(read_config("projects/kvmod/vqa.yaml", ["model.merge_visual_tokens=64"]))
    assert line.startswith("A sample: one image of 64 visual tokens, 64 into the connector; 32 soft-prompt")
    assert tokens_line(read_config("projects/kvmod/vqa.yaml")) == []


def test_what_cannot_be_tiled_is_told():
    for tiles, told in (
        ({"grids": [[1, 1]]}, r"tiles.grids: expected pairs of rows and columns such as \[1, 2\], got \[\[1, 1\]\]"),
        ({"grids": []}, r"tiles.grids: expected pairs of rows and columns such as \[1, 2\], got \[\]"),
        ({"grids": [[2, 2], [0, 3]]}, r"tiles.grids: .* got \[\[0, 3\]\]"),
        ({"grids": [[2, 2, 2]]}, r"tiles.grids: .* got \[\[2, 2, 2\]\]"),
        ({"grids": [[3, 3]]}, "tiles.max_tiles: expected at least 9, the tiles of the smallest grid, got 4"),
        ({"max_tiles": 1}, "tiles.max_tiles: expected at least 2, the tiles of the smallest grid, got 1"),
        ({"grid": []}, "tiles.*grid"),
    ):
        with pytest.raises(SettingsError, match=told):
            ModelSettings.from_config({"load_finetuned": False, "tiles": tiles})
    with pytest.raises(SettingsError, match="tiles: expected max_images: 1"):
        ModelSettings.from_config({"load_finetuned": False, "tiles": {}, "max_images": 2})
    with pytest.raises(ConfigurationError, match="expected blip_image_eval with model.tiles, got blip2_image_train"):
        name = "datasets.digits_pages.vis_processor.train.name=blip2_image_train"
        load_config("projects/kvmod/demo_pages.yaml", ["model.tiles={}", name])
