"""Images cut into tiles of one size, whose rows are packed into one sequence an image.

Which row of which tile a token is depends on the image's size alone, so it is computed here, in integers, and the
vision graph gathers: it has no branch and no shape that depends on the data.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from resprune.runtime.bundle.manifest import Range
from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.image import Box, ImageProcessor
from resprune.runtime.families.preprocessor import Arrays, PreparedImage

FURTHER = -1
"""Among an image's own rows: the row behind those of all tiles, such as LLaVA-NeXT's newline."""
PADDING = -1
"""In `pack_indices`: no row, where another image of the batch has more tokens."""
MAX_TILES = 144
"""Of one image: 4032 x 4032 pixels at the usual tile. More is a mistake in a config."""


def pack(images: Sequence[PreparedImage], tile_tokens: int) -> Arrays:
    """Images with the arrays `pixel_values` [tiles, 3, H, W] and `rows` [N] → the inputs of a vision graph of tiles.

    Where a token is made of several rows, `rows` are [N, T] and `pack_indices` [B, N, T].

    `pixel_values` [num_tiles, 3, H, W]: the tiles of all images, one after another. `pack_indices` [B, N] int64: of
    each token the row that it is, of all `tile_tokens` rows of all tiles with a further row behind them; an image with
    fewer tokens than another is filled up with PADDING.
    """
    pixels = [image.arrays["pixel_values"] for image in images]
    further = tile_tokens * sum(map(len, pixels))
    most = max(image.num_tokens for image in images)
    packed = np.full((len(images), most, *images[0].arrays["rows"].shape[1:]), PADDING, np.int64)
    first = 0
    for row, image in zip(packed, images, strict=True):
        own = image.arrays["rows"]
        row[: len(own)] = np.where(own == FURTHER, further, own + first)
        first += tile_tokens * len(image.arrays["pixel_values"])
    return {"pixel_values": np.concatenate(pixels), "pack_indices": packed}


@dataclass(frozen=True)
class Grid:
    """How many columns and rows of tiles an image is cut into; 0 × 0 is one tile alone."""

    columns: int
    rows: int

    @property
    def tiles(self) -> int:
        """Without the view of the whole image."""
        return self.columns * self.rows


@dataclass(frozen=True)
class TileProcessor:
    """Square tiles of `tile` pixels, each `side` × `side` tokens, scaled and normalised by `pixels`."""

    pixels: ImageProcessor
    tile: int
    side: int

    @property
    def tokens(self) -> int:
        """Of one tile."""
        return self.side**2

    def resized(self, image: Image.Image, width: int, height: int) -> Image.Image:
        """As Hugging Face resizes: always, even where the size stays."""
        return image.resize((width, height), self.pixels.resample)

    def cut(self, canvas: Image.Image) -> list[Image.Image]:
        """The tiles of a canvas, row by row."""
        return [
            canvas.crop((x, y, x + self.tile, y + self.tile))
            for y in range(0, canvas.height, self.tile)
            for x in range(0, canvas.width, self.tile)
        ]

    def pixel_values(self, tiles: Sequence[Image.Image]) -> npt.NDArray[np.float32]:
        """[tiles, 3, H, W] float32."""
        return np.stack([self.pixels(tile) for tile in tiles])

    def axes(self, batch: Range, tokens: Range, most: int, fewest: int = 1) -> dict[str, Range]:
        """The named axes of the vision graph's inputs (`Preprocessor.axes`), of images of so many tiles."""
        tiles = (batch[0] * fewest, batch[1] * most, batch[2] * most)
        return {"batch_size": batch, "num_tokens": tokens, "num_tiles": tiles}

    def boxes(self, image_size: tuple[int, int], grid: Grid) -> list[Box]:
        """Where the tokens of all tiles of a stretched image lie in it, tile by tile, in pixels of `image_size`."""
        width, height = image_size
        columns, rows = max(grid.columns, 1), max(grid.rows, 1)
        across, down = width / (columns * self.side), height / (rows * self.side)
        return [
            (x * across, y * down, (x + 1) * across, (y + 1) * down)
            for row in range(rows)
            for column in range(columns)
            for y in range(row * self.side, (row + 1) * self.side)
            for x in range(column * self.side, (column + 1) * self.side)
        ]


def tile_pixels(config: dict[str, Any], defaults: dict[str, Any], tile: int) -> ImageProcessor:
    """How one tile is rescaled and normalised, as `config` says; `defaults` are for what it lacks."""
    alone = {
        "image_processor_type": "SiglipImageProcessor",  # the steps of one tile are its
        "do_resize": True,
        "size": {"height": tile, "width": tile},
    }
    return ImageProcessor.from_config(defaults | config | alone)


def whole_number(config: dict[str, Any], key: str, default: int, least: int, most: int) -> int:
    """A number of preprocessor_config.json; `ResPruneError` for anything else."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ResPruneError(
            f"{key} in preprocessor_config.json should be a whole number from {least} to {most}, not {value!r:.80}; "
            "correct it in the checkpoint"
        )
    return value
