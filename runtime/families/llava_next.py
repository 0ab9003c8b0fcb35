"""LLaVA-NeXT's any-resolution images: a small view of the whole image, and tiles of a larger one.

The image is fitted into the best of a few resolutions and cut into tiles; each view and each tile is one image
to the vision tower. The language model reads the rows of the whole view, then those of the tiles as one grid: without
what the padding alone covers, and with a newline row at the end of each of its rows. Geometry, float arithmetic
included, is that of transformers' `LlavaNextImageProcessorPil` and `LlavaNextModel.pack_image_features`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from resprune.runtime.bundle.files import Bundle
from resprune.runtime.bundle.manifest import Range
from resprune.runtime.errors import ResPruneError, shown
from resprune.runtime.families.image import Box, ImageProcessor
from resprune.runtime.families.llava import tower_size
from resprune.runtime.families.preprocessor import Arrays, PreparedImage, image_processor_config
from resprune.runtime.families.tiles import FURTHER, MAX_TILES, TileProcessor, pack

PROCESSOR = "LlavaNextImageProcessor"
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))

NEWLINE = FURTHER
Size = tuple[int, int]  # width, height


@dataclass(frozen=True)
class AnyResolution:
    """Tiles of the processor's config, and the packing of the rows that the tower makes of them.

    `resolutions` are (height, width) as configs have them; `whole` is the (width, height) of the whole view; a token of
    a tile is a patch of `patch_size` pixels.
    """

    resolutions: tuple[tuple[int, int], ...]
    whole: Size
    tiles: TileProcessor
    patch_size: int
    max_batch: int | None = None

    @property
    def tile_size(self) -> tuple[int, int]:
        """Height and width of a tile as the tower gets it."""
        pixels = self.tiles.pixels(Image.new("RGB", (self.tiles.tile, self.tiles.tile)))
        return pixels.shape[1], pixels.shape[2]

    @property
    def max_tokens(self) -> int:
        """N of the image that has most: one that fills the best of the resolutions."""
        tile, side = self.tiles.tile, self.tiles.side
        grids = [(height // tile, width // tile) for height, width in self.resolutions]
        return self.tiles.tokens + max(rows * side * (columns * side + 1) for rows, columns in grids)

    def __call__(self, image: Image.Image) -> PreparedImage:
        """`pixel_values` [tiles, 3, H, W] float32, and `rows` [N] int64: a row of them each, or NEWLINE."""
        return self.prepared(image.size, self.tiles.pixel_values(self.cut(image)))

    def prepared(self, image_size: Size, pixel_values: npt.NDArray[np.float32]) -> PreparedImage:
        """An image of `image_size` (width, height) whose tiles are processed already."""
        rows = self.packed_rows(image_size)
        return PreparedImage.one_span(
            {"pixel_values": pixel_values, "rows": rows}, np.arange(len(rows)), len(rows)
        )

    def batch(self, images: Sequence[PreparedImage]) -> Arrays:
        """`pixel_values` [num_tiles, 3, H, W] and `pack_indices` [B, N] int64.

        The tiles of all images, one after another; and for each token the row that it is, of all rows of all tiles
        with the newline row behind them. An image with fewer tokens than another is filled up with PADDING.
        """
        return pack(images, self.tiles.tokens)

    def cut(self, image: Image.Image) -> list[Image.Image]:
        """The whole view, then the tiles row by row."""
        width, height = self.best_resolution(image.size)
        fitted = self._fitted(image.size)
        canvas = Image.new("RGB", (width, height))  # black
        canvas.paste(
            self.tiles.resized(image, *fitted), ((width - fitted[0]) // 2, (height - fitted[1]) // 2)
        )
        return [self.tiles.resized(image, *self.whole), *self.tiles.cut(canvas)]

    def packed_rows(self, image_size: Size) -> npt.NDArray[np.int64]:
        """[N] int64: which row of the tower's a token is, counted from the image's first; NEWLINE for a newline."""
        lines = np.pad(self.grid_rows(image_size), ((0, 0), (0, 1)), constant_values=NEWLINE)
        return np.concatenate([np.arange(self.tiles.tokens), lines.reshape(-1)])

    def grid_rows(self, image_size: Size) -> npt.NDArray[np.int64]:
        """[height, width] int64: the same of the tiles as one grid, which padding alone has no part in."""
        patches, side = self.tiles.tokens, self.tiles.side
        rows, columns = self.tile_grid(image_size)
        numbers = np.arange(patches, (1 + rows * columns) * patches, dtype=np.int64)
        grid = numbers.reshape(rows, columns, side, side).transpose(0, 2, 1, 3)
        return self._unpadded(grid.reshape(rows * side, columns * side), image_size)

    def axes(self, batch: Range, tokens: Range) -> dict[str, Range]:
        """As many tiles as the smallest and the largest of the resolutions have, whatever the tokens."""
        counts = [1 + height * width // self.tiles.tile**2 for height, width in self.resolutions]
        return self.tiles.axes(batch, tokens, max(counts), min(counts))

    def boxes(self, image_size: Size) -> list[Box | None]:
        """Patches of the whole view, which are large, then those of the tiles; a newline lies nowhere."""
        boxes = self.row_boxes(image_size)
        return [None if row == NEWLINE else boxes[row] for row in self.packed_rows(image_size)]

    def row_boxes(self, image_size: Size) -> list[Box]:
        """Where each row of the tower's output lies in the image, in its pixels, whether it becomes a token or not."""
        tile = self.tiles.tile
        in_whole = self.tiles.pixels.patch_boxes(self.whole, self.patch_size)
        in_tile = self.tiles.pixels.patch_boxes((tile, tile), self.patch_size)
        width, height = self.best_resolution(image_size)
        fitted = self._fitted(image_size)
        left, top = (width - fitted[0]) // 2, (height - fitted[1]) // 2
        boxes = [_scaled(box, (0, 0), self.whole, image_size) for box in in_whole]
        for y in range(0, height, tile):
            for x in range(0, width, tile):
                boxes += [_scaled(box, (x - left, y - top), fitted, image_size) for box in in_tile]
        return boxes

    def best_resolution(self, image_size: Size) -> Size:
        """(width, height) of the resolution that keeps most of the image's pixels, and among those wastes fewest."""
        width, height = image_size
        best, most, least_waste = (0, 0), 0, math.inf
        for rows, columns in self.resolutions:
            scale = min(columns / width, rows / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            waste = rows * columns - kept
            if kept > most or (kept == most and waste < least_waste):
                best, most, least_waste = (columns, rows), kept, waste
        return best

    def tile_grid(self, image_size: Size) -> tuple[int, int]:
        """(rows, columns) of tiles, beside the whole view, of an image of `image_size` (width, height)."""
        width, height = self.best_resolution(image_size)
        return height // self.tiles.tile, width // self.tiles.tile

    def _fitted(self, image_size: Size) -> Size:
        """Size in which the image is put into its resolution."""
        width, height = image_size
        most = self.best_resolution(image_size)
        scale_x, scale_y = most[0] / width, most[1] / height
        if scale_x < scale_y:
            return most[0], min(math.ceil(height * scale_x), most[1])
        return min(math.ceil(width * scale_y), most[0]), most[1]

    def _unpadded(self, grid: npt.NDArray[np.int64], image_size: Size) -> npt.NDArray[np.int64]:
        """The part of a grid of patches that the image itself covers."""
        width, height = image_size
        rows, columns = grid.shape
        if width / height > columns / rows:
            padding = (rows - int(round(height * (columns / width), 7))) // 2
            return grid[padding : rows - padding]
        padding = (columns - int(round(width * (rows / height), 7))) // 2
        return grid[:, padding : columns - padding]


def any_resolution(config: Mapping[str, Any], *, image_size: int, patch_size: int) -> AnyResolution:
    """From the content of a preprocessor_config.json, and the sizes of the tower in pixels.

    Raises `ResPruneError` for another kind of processor and for settings that make no sense together.
    """
    kind = str(config.get("image_processor_type")).removesuffix("Fast").removesuffix("Pil")
    if kind != PROCESSOR:
        raise ResPruneError(
            f"LLaVA-NeXT needs a {PROCESSOR}, and the checkpoint's image processor is {kind}; "
            f"correct preprocessor_config.json"
        )
    clip = {
        **config,
        "image_processor_type": "CLIPImageProcessor",
    }  # one tile's steps and defaults are its
    processor = ImageProcessor.from_config(clip)
    sizes = ImageProcessor.from_config(clip | {"do_resize": True, "do_center_crop": True})
    edge = sizes.shortest_edge
    height, width = (edge, edge) if edge is not None else sizes.resize_to or (0, 0)
    tile = height if sizes.crop is None else sizes.crop[0]
    resolutions = grid_resolutions(config.get("image_grid_pinpoints", PINPOINTS), tile)
    if tile != image_size:
        raise ResPruneError(
            f"the image processor makes tiles of {tile} pixels and the vision tower takes {image_size}; "
            f"correct crop_size in preprocessor_config.json"
        )
    tiles = TileProcessor(processor, tile, image_size // patch_size)
    return AnyResolution(resolutions, (width, height), tiles, patch_size)


def preprocessor(bundle: Bundle) -> AnyResolution:
    """From the bundle's image processor and the config of its tower."""
    return any_resolution(image_processor_config(bundle), **tower_size(bundle))


def grid_resolutions(value: object, tile: int) -> tuple[tuple[int, int], ...]:
    """The (height, width) of image_grid_pinpoints; `ResPruneError` for what are no multiples of a tile."""
    if not isinstance(value, list | tuple) or not value:
        raise _fault(value, "a list of heights and widths")
    for pair in value:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise _fault(pair, "a height and a width")
        if any(
            isinstance(side, bool) or not isinstance(side, int) or side < 1 or side % tile for side in pair
        ):
            raise _fault(pair, f"multiples of the tile's {tile} pixels")
        if pair[0] * pair[1] > MAX_TILES * tile**2:
            raise _fault(pair, f"at most {MAX_TILES} tiles")
    return tuple((pair[0], pair[1]) for pair in value)


def _fault(value: object, wanted: str) -> ResPruneError:
    return ResPruneError(
        f"image_grid_pinpoints in preprocessor_config.json has {shown(value)} where {wanted} should be; "
        f"correct it in the checkpoint"
    )


def _scaled(box: Box, shift: tuple[int, int], seen: Size, image_size: Size) -> Box:
    """A box of a view, moved by `shift` into one of size `seen` of the whole image, in the image's own pixels."""
    x, y = (
        [
            min(max((edge + shift[axis]) * image_size[axis] / seen[axis], 0.0), float(image_size[axis]))
            for edge in box[axis::2]
        ]
        for axis in range(2)
    )
    return x[0], y[0], x[1], y[1]
