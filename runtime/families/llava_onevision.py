"""LLaVA-OneVision: LLaVA-NeXT's any resolution up to a limit of tiles; a larger grid of rows is made smaller.

A grid with many more rows than the limit's tiles have is interpolated to about as many, so a token is a weighted sum of
four rows of the tower. Which four, and their weights, depend on the image's size alone and are computed here, as
`LlavaOnevisionModel.pack_image_features` of transformers has `torch.nn.functional.interpolate` compute them.

Every image is cut into tiles, also among several in one prompt, as transformers' image processor does with a list of
images. (With a list of lists it does so only to the image that is alone in its list.)
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from resprune.runtime.bundle.files import Bundle
from resprune.runtime.errors import ResPruneError, shown
from resprune.runtime.families.image import OPENAI_CLIP, Box
from resprune.runtime.families.llava import tower_size
from resprune.runtime.families.llava_next import NEWLINE, AnyResolution, Size, grid_resolutions
from resprune.runtime.families.preprocessor import Arrays, PreparedImage, image_processor_config
from resprune.runtime.families.tiles import TileProcessor, tile_pixels

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

PROCESSOR = "LlavaOnevisionImageProcessor"
TILE = 384
DEFAULTS = {**OPENAI_CLIP, "resample": 3, "size": {"height": TILE, "width": TILE}}
PINPOINTS = [[rows * TILE, columns * TILE] for rows in range(1, 7) for columns in range(1, 7)]
ASPECT_RATIO = "anyres_max_9"
MOST_OVER = 1.1
"""How much longer than the limit's a side may be, on average of the two, before the grid is interpolated."""


@dataclass(frozen=True)
class LimitedResolution(AnyResolution):
    """`AnyResolution`, whose grid of rows is interpolated if it is much larger than that of `limit` tiles."""

    limit: int = field(kw_only=True)

    @property
    def max_tokens(self) -> int:
        """N that no image exceeds: of every part of every grid that an image can fill."""
        tile, side = self.tiles.tile, self.tiles.side
        grids = [(height // tile * side, width // tile * side) for height, width in self.resolutions]
        filled = [
            self._grid_size(*part)
            for height, width in grids
            for part in (
                *((rows, width) for rows in range(height, 0, -2)),
                *((height, columns) for columns in range(width, 0, -2)),
            )
        ]
        return self.tiles.tokens + max(rows * (columns + 1) for rows, columns in filled)

    def prepared(self, image_size: Size, pixel_values: npt.NDArray[np.float32]) -> PreparedImage:
        """An image of `image_size` (width, height) whose tiles are processed already."""
        rows, weights = self.taps(image_size)
        arrays: Arrays = {"pixel_values": pixel_values, "rows": rows, "weights": weights}
        return PreparedImage.one_span(arrays, np.arange(len(rows)), len(rows))

    def batch(self, images: Sequence[PreparedImage]) -> Arrays:
        """`pixel_values` [num_tiles, 3, H, W], `pack_indices` [B, N, 4] int64 and `pack_weights` [B, N, 4] float32."""
        inputs = super().batch(images)
        weights = np.zeros(inputs["pack_indices"].shape, np.float32)
        for row, image in zip(weights, images, strict=True):
            row[: image.num_tokens] = image.arrays["weights"]
        return inputs | {"pack_weights": weights}

    def boxes(self, image_size: Size) -> list[Box | None]:
        """Patches of the whole view, which are large, then those of the tiles; a newline lies nowhere."""
        grid = self.grid_rows(image_size)
        rows, columns = self._grid_size(*grid.shape)
        if (rows, columns) == grid.shape:
            return super().boxes(image_size)
        patches = self.row_boxes(image_size)
        x = _edges([patches[row][0] for row in grid[0]] + [patches[grid[0, -1]][2]], columns)
        y = _edges([patches[row][1] for row in grid[:, 0]] + [patches[grid[-1, 0]][3]], rows)
        lines: list[Box | None] = []
        for row in range(rows):
            lines += [(x[column], y[row], x[column + 1], y[row + 1]) for column in range(columns)]
            lines.append(None)
        return [*patches[: self.tiles.tokens], *lines]

    def interpolates(self, image_size: Size) -> bool:
        """Whether an image of `image_size` (width, height) is past the limit."""
        grid = self.grid_rows(image_size)
        return self._grid_size(*grid.shape) != grid.shape

    def taps(self, image_size: Size) -> tuple[Ints, Floats]:
        """The four rows that each token is made of, [N, 4] int64 as `AnyResolution.packed_rows`, and their weights."""
        grid = self.grid_rows(image_size)
        rows, columns = self._grid_size(*grid.shape)
        if (rows, columns) == grid.shape:
            packed = self.packed_rows(image_size)
            return np.repeat(packed[:, None], 4, axis=1), _alone(len(packed))
        down, down_weights = bilinear(grid.shape[0], rows)
        across, across_weights = bilinear(grid.shape[1], columns)
        taken = grid[down[:, None, :, None], across[None, :, None, :]].reshape(rows, columns, 4)
        weights = (down_weights[:, None, :, None] * across_weights[None, :, None, :]).reshape(
            rows, columns, 4
        )
        lines = np.pad(taken, ((0, 0), (0, 1), (0, 0)), constant_values=NEWLINE)
        line_weights = np.concatenate([weights, _alone(rows)[:, None]], axis=1)
        whole = np.repeat(np.arange(self.tiles.tokens)[:, None], 4, axis=1)
        return (
            np.concatenate([whole, lines.reshape(-1, 4)]),
            np.concatenate([_alone(len(whole)), line_weights.reshape(-1, 4)]),
        )

    def _grid_size(self, rows: int, columns: int) -> tuple[int, int]:
        """What the grid is interpolated to; as it is, if that is not much larger than the limit."""
        ratio = math.sqrt(rows * columns / (self.limit * self.tiles.tokens))
        if ratio <= MOST_OVER:
            return rows, columns
        if min(rows, columns) < ratio:
            raise ResPruneError(
                f"a grid of {rows} x {columns} patches has no row left when it is interpolated to {self.limit} tiles; "
                "correct vision_aspect_ratio or image_grid_pinpoints in config.json"
            )
        return int(rows // ratio), int(columns // ratio)


def limited_resolution(
    config: Mapping[str, Any], *, image_size: int, patch_size: int, limit: int
) -> LimitedResolution:
    """From the content of a preprocessor_config.json, the sizes of the tower in pixels, and the limit.

    Raises `ResPruneError` for another kind of processor and for settings that make no sense together.
    """
    kind = str(config.get("image_processor_type")).removesuffix("Fast").removesuffix("Pil")
    if kind != PROCESSOR:
        raise ResPruneError(
            f"LLaVA-OneVision needs a {PROCESSOR}, and the checkpoint's image processor is {kind}; "
            "correct preprocessor_config.json"
        )
    size = config.get("size", DEFAULTS["size"])
    if size != {"height": image_size, "width": image_size} or config.get("do_center_crop"):
        raise ResPruneError(
            f"the image processor makes tiles of {shown(size)} and the vision tower takes {image_size} x "
            f"{image_size} pixels, uncropped; correct size and do_center_crop in preprocessor_config.json"
        )
    return LimitedResolution(
        grid_resolutions(config.get("image_grid_pinpoints", PINPOINTS), image_size),
        (image_size, image_size),
        TileProcessor(tile_pixels(dict(config), DEFAULTS, image_size), image_size, image_size // patch_size),
        patch_size,
        limit=limit,
    )


def preprocessor(bundle: Bundle) -> LimitedResolution:
    """From the bundle's image processor and config."""
    limit = tile_limit(bundle.json("config.json"))
    return limited_resolution(image_processor_config(bundle), **tower_size(bundle), limit=limit)


def bilinear(size: int, wanted: int) -> tuple[Ints, Floats]:
    """Of each of `wanted` places along `size` rows, the two rows about it, [wanted, 2] int64, and their weights.

    Corners not aligned, in float32, as `torch.nn.functional.interpolate` computes them: the product and the sum are
    rounded once, which float64 gives here.
    """
    scale = np.float64(np.float32(size) / np.float32(wanted))
    source = np.maximum(scale * (np.arange(wanted) + 0.5) - 0.5, 0).astype(np.float32)
    first = np.minimum(source.astype(np.int64), size - 1)
    second = np.minimum(first + 1, size - 1)
    weight = np.clip(source - first.astype(np.float32), np.float32(0), np.float32(1))
    return np.stack([first, second], axis=1), np.stack([np.float32(1) - weight, weight], axis=1)


def tile_limit(config: Mapping[str, Any]) -> int:
    """How many tiles' rows an image may have beside its whole view, from a config.json."""
    value = config.get("vision_aspect_ratio", ASPECT_RATIO)
    found = re.fullmatch(r"anyres_max_([1-9][0-9]{0,3})", value) if isinstance(value, str) else None
    if found is None:
        raise ResPruneError(
            f"vision_aspect_ratio in config.json should be anyres_max_ and a number, not {shown(value)}; correct it"
        )
    return int(found[1])


def _alone(count: int) -> Floats:
    """[count, 4]: the first of the four rows, and nothing of the others."""
    return np.tile(np.array([1, 0, 0, 0], np.float32), (count, 1))


def _edges(edges: list[float], count: int) -> list[float]:
    """The `count` + 1 edges of as many equal parts of the patches between `edges`."""
    places = np.linspace(0, len(edges) - 1, count + 1)
    return [float(edge) for edge in np.interp(places, np.arange(len(edges)), edges)]
