"""InternVL 3 and 3.5: up to twelve tiles of 448 pixels and a thumbnail, 256 tokens each, side by side in the prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from resprune.runtime.bundle.files import Bundle
from resprune.runtime.bundle.manifest import Range
from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.image import OPENAI_CLIP, Box
from resprune.runtime.families.preprocessor import Arrays, PreparedImage, image_processor_config
from resprune.runtime.families.tiles import (
    MAX_TILES,
    Grid,
    TileProcessor,
    pack,
    tile_pixels,
    whole_number,
)

# GotOcr2ImageProcessor's, which InternVL's checkpoints name.
DEFAULTS = {**OPENAI_CLIP, "resample": 3, "size": {"height": 384, "width": 384}}
IMAGE_TOKEN = "<IMG_CONTEXT>"  # noqa: S105 - a token of text
START, END = "<img>", "</img>"


@dataclass(frozen=True)
class Thumbnailed:
    """Tiles of the grid whose shape is nearest the image's, and the whole image if they are several.

    `fewest` and `most` bound the number of tiles, the whole image not counted.
    """

    tiles: TileProcessor
    fewest: int
    most: int
    max_batch: int | None = None

    @staticmethod
    def from_config(config: dict[str, Any], *, tile: int, side: int) -> "Thumbnailed":
        """From the image processor's settings; `tile` pixels and `side` tokens are the tower's."""
        size = config.get("size", DEFAULTS["size"])
        if size != {"height": tile, "width": tile}:
            raise ResPruneError(
                f"the image processor makes tiles of {size!r:.80} and the vision tower takes {tile} x {tile} pixels; "
                "correct size in preprocessor_config.json"
            )
        fewest = whole_number(config, "min_patches", 1, 1, MAX_TILES)
        most = whole_number(config, "max_patches", 12, 1, MAX_TILES)
        if fewest > most:
            raise ResPruneError(
                f"min_patches {fewest} is more than max_patches {most} in preprocessor_config.json; correct them"
            )
        return Thumbnailed(TileProcessor(tile_pixels(config, DEFAULTS, tile), tile, side), fewest, most)

    @staticmethod
    def from_bundle(bundle: Bundle) -> "Thumbnailed":
        """From the bundle's image processor and config."""
        return Thumbnailed.from_config(
            image_processor_config(bundle), **tower_side(bundle.json("config.json"))
        )

    @property
    def max_tokens(self) -> int:
        """N of the image that has most."""
        return self.tiles.tokens * (self.most + (self.most > 1))

    def __call__(self, image: Image.Image) -> PreparedImage:
        """`pixel_values` [tiles, 3, H, W] float32, and `rows` [N] int64."""
        grid, tile = self.grid(image.size), self.tiles.tile
        whole = self.tiles.resized(image, tile, tile)
        cut = [whole]
        if grid.tiles > 1:
            canvas = self.tiles.resized(image, grid.columns * tile, grid.rows * tile)
            cut = [*self.tiles.cut(canvas), whole]
        return self.prepared(self.tiles.pixel_values(cut))

    def prepared(self, pixel_values: Any) -> PreparedImage:
        """An image whose tiles [tiles, 3, H, W] are processed already."""
        rows = np.arange(len(pixel_values) * self.tiles.tokens)
        return PreparedImage(
            {"pixel_values": pixel_values, "rows": rows},
            rows,
            (len(rows),),
            (len(rows),),
            f"{START}{IMAGE_TOKEN}{END}",
        )

    def batch(self, images: Sequence[PreparedImage]) -> Arrays:
        """`pixel_values` [num_tiles, 3, H, W] and `pack_indices` [B, N] int64 (`tiles.pack`)."""
        return pack(images, self.tiles.tokens)

    def axes(self, batch: Range, tokens: Range) -> dict[str, Range]:
        """One tile an image at least."""
        return self.tiles.axes(batch, tokens, self.most + 1)

    def boxes(self, image_size: tuple[int, int]) -> list[Box | None]:
        """Patches of the tiles, then those of the thumbnail, which are large."""
        grid = self.grid(image_size)
        boxes: list[Box | None] = [*self.tiles.boxes(image_size, grid)]
        return boxes if grid.tiles == 1 else [*boxes, *self.tiles.boxes(image_size, Grid(1, 1))]

    def grid(self, image_size: tuple[int, int]) -> Grid:
        """The grid whose shape is nearest that of an image of `image_size` (width, height).

        Of equally near ones the larger, while the image fills half of it.
        """
        width, height = image_size
        best, least = Grid(1, 1), float("inf")
        grids = [
            Grid(columns, rows)
            for columns in range(1, self.most + 1)
            for rows in range(1, self.most + 1)
            if self.fewest <= columns * rows <= self.most
        ]
        for grid in sorted(grids, key=lambda grid: grid.tiles):
            distance = abs(width / height - grid.columns / grid.rows)
            fills = width * height > 0.5 * self.tiles.tile * self.tiles.tile * grid.columns * grid.rows
            if distance < least or (distance == least and fills):
                best, least = grid, distance
        return best


preprocessor = Thumbnailed.from_bundle


def tower_side(config: dict[str, Any]) -> dict[str, int]:
    """`tile` in pixels and `side` in tokens of the vision tower, from a config.json."""
    vision = config.get("vision_config")
    vision = vision if isinstance(vision, dict) else {}
    image, patch = (
        _square(vision.get(key, default), key) for key, default in (("image_size", 448), ("patch_size", 14))
    )
    ratio = config.get("downsample_ratio", 0.5)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise ResPruneError(
            f"downsample_ratio in config.json should be above 0 and at most 1, not {ratio!r:.80}"
        )
    return {"tile": image, "side": int(image // patch * ratio)}


def _square(value: object, key: str) -> int:
    sides = value if isinstance(value, list) else [value, value]
    if len(sides) != 2 or sides[0] != sides[1] or type(sides[0]) is not int or sides[0] < 1:
        raise ResPruneError(
            f"vision_config.{key} in config.json should be one number from 1, not {value!r:.80}; tiles are square"
        )
    return int(sides[0])
