"""SmolVLM2 and Idefics3: tiles with `<row_1_col_1>` between them in the prompt, and a view of the whole image.

So an image is several spans of the prompt: one a tile, in reading order, then one for the whole view.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from resprune.runtime.bundle.files import Bundle
from resprune.runtime.bundle.manifest import Range
from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.image import IMAGENET_STANDARD, Box
from resprune.runtime.families.preprocessor import Arrays, PreparedImage, image_processor_config
from resprune.runtime.families.tiles import Grid, TileProcessor, pack, tile_pixels

DEFAULTS = {**IMAGENET_STANDARD, "resample": 1, "size": {"longest_edge": 4 * 364}}
TILE = {"longest_edge": 364}
LARGEST = 4096
"""No side of an image is resized to more pixels."""
IMAGE_TOKEN, FAKE, WHOLE = "<image>", "<fake_token_around_image>", "<global-img>"


@dataclass(frozen=True)
class SplitImage:
    """An image brought to multiples of a tile, its tiles, and the whole of it as one tile."""

    tiles: TileProcessor
    longest_edge: int | None
    """The longer side is resized to this first; None leaves it."""
    splits: bool
    max_batch: int | None = None

    @staticmethod
    def from_config(config: dict[str, Any], *, side: int) -> "SplitImage":
        """From the image processor's settings; `side` tokens of a tile are the tower's."""
        tile = _longest_edge(config.get("max_image_size", TILE), "max_image_size")
        resizes = config.get("do_resize", True)
        longest = _longest_edge(config.get("size", DEFAULTS["size"]), "size") if resizes else None
        tiles = TileProcessor(tile_pixels(config, DEFAULTS, tile), tile, side)
        return SplitImage(tiles, longest, bool(config.get("do_image_splitting", True)))

    @staticmethod
    def from_bundle(bundle: Bundle) -> "SplitImage":
        """From the bundle's image processor and config."""
        return SplitImage.from_config(
            image_processor_config(bundle), side=tower_side(bundle.json("config.json"))
        )

    @property
    def max_tokens(self) -> int:
        """N of the image that has most: a square one, for the shorter side of others is shorter."""
        if not self.splits:
            return self.tiles.tokens
        longest = LARGEST if self.longest_edge is None else min(self.longest_edge, LARGEST)
        across = math.ceil(longest / self.tiles.tile)
        return self.tiles.tokens * (across**2 + (across > 1))

    def __call__(self, image: Image.Image) -> PreparedImage:
        """`pixel_values` [tiles, 3, H, W] float32, and `rows` [N] int64."""
        tile = self.tiles.tile
        if self.longest_edge is not None:
            image = self.tiles.resized(image, *_fitted(image.size, self.longest_edge))
        if not self.splits:
            return self.prepared(self.tiles.pixel_values([self.tiles.resized(image, tile, tile)]), Grid(0, 0))
        canvas = self.tiles.resized(image, *_multiples(image.size, tile))
        grid = self._grid_of(canvas.size)
        cut = (
            [canvas] if grid.tiles == 0 else [*self.tiles.cut(canvas), self.tiles.resized(canvas, tile, tile)]
        )
        return self.prepared(self.tiles.pixel_values(cut), grid)

    def prepared(self, pixel_values: Any, grid: Grid) -> PreparedImage:
        """An image whose tiles [tiles, 3, H, W] are processed already."""
        count, tokens = len(pixel_values), self.tiles.tokens
        return PreparedImage(
            {"pixel_values": pixel_values, "rows": np.arange(count * tokens)},
            np.tile(np.arange(tokens), count),
            (tokens,) * count,
            (tokens,) * count,
            _expansion(grid),
        )

    def batch(self, images: Sequence[PreparedImage]) -> Arrays:
        """`pixel_values` [num_tiles, 3, H, W] and `pack_indices` [B, N] int64 (`tiles.pack`)."""
        return pack(images, self.tiles.tokens)

    def axes(self, batch: Range, tokens: Range) -> dict[str, Range]:
        """One tile an image at least."""
        return self.tiles.axes(batch, tokens, self.max_tokens // self.tiles.tokens)

    def boxes(self, image_size: tuple[int, int]) -> list[Box | None]:
        """Patches of the tiles, then those of the whole view, which are large."""
        whole: list[Box | None] = [*self.tiles.boxes(image_size, Grid(1, 1))]
        grid = self.grid(image_size)
        return whole if grid.tiles == 0 else [*self.tiles.boxes(image_size, grid), *whole]

    def grid(self, image_size: tuple[int, int]) -> Grid:
        """How an image of `image_size` (width, height) is cut; 0 × 0 where one tile holds it."""
        if not self.splits:
            return Grid(0, 0)
        if self.longest_edge is not None:
            image_size = _fitted(image_size, self.longest_edge)
        return self._grid_of(_multiples(image_size, self.tiles.tile))

    def _grid_of(self, canvas: tuple[int, int]) -> Grid:
        tile = self.tiles.tile
        if max(canvas) <= tile:
            return Grid(0, 0)
        return Grid(canvas[0] // tile, canvas[1] // tile)


preprocessor = SplitImage.from_bundle


def tower_side(config: dict[str, Any]) -> int:
    """Tokens a side of one tile, from a config.json."""
    vision = config.get("vision_config")
    vision = vision if isinstance(vision, dict) else {}
    sizes = {
        "image_size": vision.get("image_size", 224),
        "patch_size": vision.get("patch_size", 32),
        "scale_factor": config.get("scale_factor", 2),
    }
    for key, value in sizes.items():
        if type(value) is not int or value < 1:
            raise ResPruneError(f"{key} in config.json should be a whole number from 1, not {value!r:.80}")
    return int(sizes["image_size"] // sizes["patch_size"] // sizes["scale_factor"])


def _expansion(grid: Grid) -> str:
    """What the processor of Hugging Face writes, with one image token for each span."""
    rows = "".join(
        "".join(f"{FAKE}<row_{row}_col_{column}>{IMAGE_TOKEN}" for column in range(1, grid.columns + 1))
        + "\n"
        for row in range(1, grid.rows + 1)
    )
    return f"{rows}\n{FAKE}{WHOLE}{IMAGE_TOKEN}{FAKE}" if rows else f"{FAKE}{WHOLE}{IMAGE_TOKEN}{FAKE}"


def _fitted(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """(width, height) with the longer side resized to `longest`, the other even, and neither above LARGEST."""
    width, height = size
    shape = width / height
    if width >= height:
        width, height = longest, int(longest / shape)
        height += height % 2
    else:
        width, height = int(longest * shape), longest
        width += width % 2
    width, height = max(width, 1), max(height, 1)
    shape = width / height
    if width >= height and width > LARGEST:
        width, height = LARGEST, int(LARGEST / shape)
    elif height > width and height > LARGEST:
        width, height = int(LARGEST * shape), LARGEST
    return max(width, 1), max(height, 1)


def _multiples(size: tuple[int, int], tile: int) -> tuple[int, int]:
    """(width, height) rounded up to multiples of the tile, the longer side first."""
    width, height = size
    shape = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / shape) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * shape) / tile) * tile
    return width, height


def _longest_edge(value: object, key: str) -> int:
    edge = value.get("longest_edge") if isinstance(value, dict) else None
    if type(edge) is not int or not 1 <= edge <= LARGEST:
        raise ResPruneError(
            f"{key} in preprocessor_config.json should have a longest_edge from 1 to {LARGEST}, not {value!r:.80}; "
            "correct it in the checkpoint"
        )
    return edge
