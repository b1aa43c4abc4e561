"""``tiles``: a large image as itself, small, and cut into the grid that fits it best (LLaVA-NeXT's AnyRes).

    ┌───────────┐        ┌─────┐   ┌─────┬─────┐
    │           │   ─►   │ 0   │ , │ 1   │ 2   │      whole image and tiles, each as large as the image encoder takes
    └───────────┘        └─────┘   └─────┴─────┘

What is in common to the data, which cut, and the model, which has to know the places.
"""

from typing import List, NamedTuple, Tuple

from lavis_kvmod.system.schema import Settings, key

__all__ = ["Grid", "TilesSettings"]


class Grid(NamedTuple):
    """Rows and columns of tiles, and the number of its first one among all places; 0 is the whole image's."""

    rows: int
    columns: int
    first_place: int

    @property
    def places(self) -> List[int]:
        """The tiles' places, row by row."""
        return list(range(self.first_place, self.first_place + self.rows * self.columns))


class TilesSettings(Settings):
    """``model.tiles``."""

    grids: List[List[int]] = key(
        [[1, 2], [2, 1], [2, 2], [1, 3], [3, 1]],
        "rows and columns of the grids to choose from",
        expected="a list of pairs of numbers",
    )
    max_tiles: int = key(4, "the most tiles beside the whole image; larger grids are left out", gt=0)

    def conflicts(self) -> List[str]:
        """Grids that are none, and those that none is left of."""
        wrong = [grid for grid in self.grids if len(grid) != 2 or min(grid) < 1 or max(grid) < 2]
        if wrong or not self.grids:
            return [f"grids: expected pairs of rows and columns such as [1, 2], got {wrong or self.grids}"]
        smallest = min(rows * columns for rows, columns in self.grids)
        if smallest > self.max_tiles:
            return [f"max_tiles: expected at least {smallest}, the tiles of the smallest grid, got {self.max_tiles}"]
        return super().conflicts()

    @property
    def chosen_from(self) -> List[Grid]:
        """The grids, without those that are too large; each tile of each has a place of its own."""
        found, place = [], 1
        for rows, columns in self.grids:
            if rows * columns <= self.max_tiles:
                found.append(Grid(rows, columns, place))
                place += rows * columns
        return found

    @property
    def num_places(self) -> int:
        """How many places there are: the whole image's, and those of each grid's tiles."""
        return 1 + sum(len(grid.places) for grid in self.chosen_from)

    @property
    def most_images(self) -> int:
        """The most images that one becomes."""
        return 1 + max(len(grid.places) for grid in self.chosen_from)

    def best_for(self, width: int, height: int, side: int) -> Grid:
        """The grid of tiles of ``side`` pixels in which most of an image's pixels are kept; of equals the one that
        wastes least (LLaVA-NeXT's choice)."""

        def kept_and_waste(grid: Grid) -> Tuple[int, int]:
            room = (grid.columns * side, grid.rows * side)
            scale = min(room[0] / width, room[1] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - room[0] * room[1]

        return max(self.chosen_from, key=kept_and_waste)
