"""An image processor that gives a large image as a whole and in tiles: see `lavis_kvmod.system.tiles`."""

from typing import Any, Dict, List, NamedTuple, Optional, Union

import torch
from PIL import Image
from torch import Tensor

from lavis_kvmod.system.tiles import TilesSettings

__all__ = ["Tiled", "Tiles", "view_of"]


class Tiles(NamedTuple):
    """An image as a whole and in tiles (k, 3, H, H), and the place of each (k,)."""

    image: Tensor
    places: Tensor


class Tiled:
    """LAVIS's image processor, for the whole image and for each tile.

    The image is stretched to the grid, as BLIP's processors stretch it to a square; LLaVA-NeXT pads it.

    Args:
        processor: gives the same pixels every time; random crops would tear the tiles apart.
        tiles: the grids to choose from.
        side: of a tile in pixels.
    """

    def __init__(self, processor: Any, tiles: TilesSettings, side: int):
        self.processor, self.tiles, self.side = processor, tiles, side

    @property
    def normalize(self) -> Any:
        """The processor's, for those who make pictures of pixels again."""
        return self.processor.normalize

    def __call__(self, image: Image.Image) -> Tiles:
        """The whole image and its tiles, row by row."""
        grid, side = self.tiles.best_for(image.width, image.height, self.side), self.side
        large = image.resize((grid.columns * side, grid.rows * side), Image.Resampling.BICUBIC)
        corners = [(column * side, row * side) for row in range(grid.rows) for column in range(grid.columns)]
        tiles = [large.crop((left, top, left + side, top + side)) for left, top in corners]
        return Tiles(torch.stack([self.processor(part) for part in (image, *tiles)]), torch.tensor([0, *grid.places]))


def view_of(processor: Any, image: Image.Image, key: Optional[str]) -> Dict[str, Any]:
    """What a sample has of an image: ``image`` (3, H, H), or its tiles (k, 3, H, H) with ``image_place`` (k,); with
    ``image_key``, where the processor gives the same pixels every time, one or a list."""
    seen = processor(image)
    keys: Union[str, List[str], None] = key
    sample = {"image": seen}
    if isinstance(seen, Tiles):
        sample = {"image": seen.image, "image_place": seen.places}
        keys = None if key is None else [f"{key}#{place}" for place in seen.places.tolist()]
    return sample if keys is None else {**sample, "image_key": keys}
