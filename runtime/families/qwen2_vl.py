"""Images for Qwen2-VL and Qwen2.5-VL: resized to a grid of patches, and what the vision graph reads of that grid.

The same numbers as Hugging Face's `Qwen2VLImageProcessor` (PIL backend) and `transformers.vision_utils`. Patches stand
in merge order: merged token by merged token, row by row, and inside a merged token its `merge_size`² patches row by
row. The vision graph keeps that order from end to end.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from resprune.names import EARLY_AXIS, EARLY_RANKS, VISION_SELECT
from resprune.runtime.bundle.files import Bundle
from resprune.runtime.bundle.manifest import Early, Range
from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.image import OPENAI_CLIP, Box, ImageProcessor, setting_fault
from resprune.runtime.families.preprocessor import Arrays, PreparedImage, image_processor_config

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

PIXEL_LIMITS = {"min_pixels": ("shortest_edge", 56 * 56), "max_pixels": ("longest_edge", 28 * 28 * 1280)}
SIZES = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
MAX_ASPECT = 200


@dataclass(frozen=True)
class Grid:
    """The patches of one image, `rows` by `columns`, both multiples of `merge_size`."""

    rows: int
    columns: int
    merge_size: int

    @property
    def merged(self) -> tuple[int, int]:
        """Rows and columns of merged tokens, the candidates of the selection."""
        return self.rows // self.merge_size, self.columns // self.merge_size

    @property
    def num_tokens(self) -> int:
        """N, the merged tokens."""
        return math.prod(self.merged)

    @property
    def thw(self) -> tuple[int, int, int]:
        """The image's row of Hugging Face's `image_grid_thw`."""
        return 1, self.rows, self.columns


@dataclass(frozen=True)
class DynamicResolution:
    """Resize to whole merged tokens within the limits, rescale, normalise, and cut into patches.

    `window_patches` is how many patches a window of the tower's windowed attention has; None: it has no windows.
    `early` is the selection inside the tower; None: there is none.
    """

    values: ImageProcessor
    """All but the size, which differs from image to image."""
    min_pixels: int
    max_pixels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    window_patches: int | None = None
    early: Early | None = None
    max_batch: int | None = 1

    @staticmethod
    def from_bundle(bundle: Bundle) -> "DynamicResolution":
        """From the bundle's image processor and its vision graph's inputs."""
        shapes = {spec.name: spec.shape for spec in bundle.graph(VISION_SELECT).inputs}
        window_patches = None
        if "window_patches" in shapes:  # [windows, patches of a window]
            shape = shapes["window_patches"]
            if len(shape) != 2 or not isinstance(shape[1], int):
                raise ResPruneError(
                    f"the vision graph in {bundle.root} has windows of no fixed size; export it again"
                )
            window_patches = shape[1]
        return DynamicResolution.from_config(
            image_processor_config(bundle), window_patches=window_patches, early=bundle.manifest.early
        )

    @staticmethod
    def from_config(
        config: Mapping[str, Any], *, window_patches: int | None = None, early: Early | None = None
    ) -> "DynamicResolution":
        """From the content of a preprocessor_config.json, with `size` or the older `min_pixels` and `max_pixels`.

        Raises `ResPruneError` for a value that makes no sense.
        """
        if not config.get("do_resize", True):
            raise setting_fault("do_resize", False)
        size = config.get("size") or {}
        if not isinstance(size, Mapping):
            raise setting_fault("size", size)
        limits = {
            key: _first(config.get(key), size.get(edge), size.get(key), default)
            for key, (edge, default) in PIXEL_LIMITS.items()
        }
        sizes = {key: _first(config.get(key), default) for key, default in SIZES.items()}
        numbers = {key: _whole(key, value) for key, value in (limits | sizes).items()}
        if numbers["min_pixels"] > numbers["max_pixels"]:
            raise ResPruneError(
                f"max_pixels {numbers['max_pixels']} is below min_pixels {numbers['min_pixels']}; give at least that"
            )
        if window_patches is not None and math.isqrt(window_patches) ** 2 != window_patches:
            raise ResPruneError(f"a window of {window_patches} patches is no square; export the bundle again")
        if window_patches is not None and (
            window_patches < 1 or math.isqrt(window_patches) % numbers["merge_size"]
        ):
            raise setting_fault("merge_size", numbers["merge_size"])
        # Of the processors that resize to a given height and width; the size is set anew for each image.
        fixed = {
            "image_processor_type": "SiglipImageProcessor",
            "size": {"height": 1, "width": 1},
            "do_center_crop": False,
            "do_pad": False,
        }
        values = ImageProcessor.from_config(OPENAI_CLIP | dict(config) | fixed)
        return DynamicResolution(values, **numbers, window_patches=window_patches, early=early)

    @property
    def max_tokens(self) -> int:
        """The most merged tokens that `smart_resize` gives any image, for some of which that is past `max_pixels`.

        It rounds the sides of a small image up, and those of a thin one to at least one token.
        """
        area = (self.patch_size * self.merge_size) ** 2
        most, least = self.max_pixels / area, self.min_pixels / area
        # One row of an image as thin as may be, of which less than a row would be left.
        thin = math.floor(math.sqrt(most * MAX_ASPECT)) if most < MAX_ASPECT else 0
        # An image that is brought up to `least`, by its rows before they are rounded up.
        thinnest = math.sqrt(least / MAX_ASPECT)
        up = max(
            (rows + 1) * (math.floor(least / max(rows, thinnest)) + 1)
            for rows in range(math.floor(thinnest), math.isqrt(math.floor(least)) + 1)
        )
        return max(math.floor(most), thin, up)

    def grid(self, image_size: tuple[int, int]) -> Grid:
        """The grid of an image of `image_size` (width, height).

        `ResPruneError` for an image more than 200 times as long as wide.
        """
        width, height = image_size
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise ResPruneError(
                f"the image is too long and thin ({width} x {height} pixels, at most {MAX_ASPECT} : 1); "
                "cut a part out of it"
            )
        factor = self.patch_size * self.merge_size
        resized = smart_resize(
            height, width, factor=factor, min_pixels=self.min_pixels, max_pixels=self.max_pixels
        )
        return Grid(resized[0] // self.patch_size, resized[1] // self.patch_size, self.merge_size)

    def __call__(self, image: Image.Image) -> PreparedImage:
        """Patches, and what the graph reads of their grid; `offsets` [3, N] are (t, h, w) from the image's first."""
        patches, grid = self.patches(image)
        arrays = self.arrays(patches, grid)
        if self.window_patches is not None:
            arrays["window_patches"], arrays["window_slots"] = windows(grid, self.window_patches)
        # The text after an image goes on from its longer side (M-RoPE).
        return PreparedImage.one_span(arrays, token_positions(grid), max(grid.merged))

    def arrays(self, patches: Floats, grid: Grid) -> Arrays:
        """What every such tower takes of an image: patches, where they are, and how many tokens it selects."""
        arrays: Arrays = {"pixel_values": patches, "patch_positions": patch_positions(grid)}
        if self.early is not None:
            arrays[EARLY_RANKS] = np.arange(self.early.left(grid.num_tokens))
        return arrays

    def batch(self, images: Sequence[PreparedImage]) -> Arrays:
        """The arrays of the one image that a run takes."""
        (image,) = images
        return image.arrays

    def patches(self, image: Image.Image) -> tuple[Floats, Grid]:
        """RGB image → `pixel_values` [patches, 3 · temporal · patch · patch] float32 in merge order, and its grid."""
        grid = self.grid(image.size)
        size = (grid.rows * self.patch_size, grid.columns * self.patch_size)
        pixels = replace(self.values, resize_to=size)(image)  # [3, H, W]
        rows, columns = grid.merged
        m, p = self.merge_size, self.patch_size
        patches = pixels.reshape(3, rows, m, p, columns, m, p).transpose(1, 4, 2, 5, 0, 3, 6)
        # A still image is a film whose frames are all the same.
        patches = np.broadcast_to(
            patches[:, :, :, :, :, None], (rows, columns, m, m, 3, self.temporal_patch_size, p, p)
        )
        return patches.reshape(grid.rows * grid.columns, -1), grid

    def axes(self, batch: Range, tokens: Range) -> dict[str, Range]:
        """Of one image: its windows are fewest in whole blocks, most in one thin row, usual in a square."""
        least, usual, most = tokens
        patches = self.merge_size**2
        side = 1 if self.window_patches is None else math.isqrt(self.window_patches) // self.merge_size
        square = math.ceil(math.sqrt(usual) / side) ** 2
        fewest, thin = -(-least // side**2), -(-most // side)
        left = {}
        if self.early is not None:
            left = {EARLY_AXIS: (self.early.left(least), self.early.left(usual), self.early.left(most))}
        return left | {
            "batch_size": (1, 1, 1),
            "num_tokens": tokens,
            "num_patches": (patches * least, patches * usual, patches * most),
            "num_windows": (fewest, min(square, thin), thin),
        }

    def boxes(self, image_size: tuple[int, int]) -> list[Box | None]:
        """Where each merged token lies in an image of `image_size` (width, height), in its pixels."""
        rows, columns = self.grid(image_size).merged
        x = [image_size[0] * column / columns for column in range(columns + 1)]
        y = [image_size[1] * row / rows for row in range(rows + 1)]
        return [
            (x[column], y[row], x[column + 1], y[row + 1]) for row in range(rows) for column in range(columns)
        ]


preprocessor = DynamicResolution.from_bundle


def smart_resize(
    height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Height and width rounded to multiples of `factor`, and scaled where their product leaves the limits."""
    rounded = round(height / factor) * factor, round(width / factor) * factor
    if rounded[0] * rounded[1] > max_pixels:
        beta = math.sqrt((height * width) / max_pixels)
        return (
            max(factor, math.floor(height / beta / factor) * factor),
            max(factor, math.floor(width / beta / factor) * factor),
        )
    if rounded[0] * rounded[1] < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        return math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor
    return rounded


def patch_positions(grid: Grid) -> Ints:
    """[patches, 2]: row and column of each patch, in merge order; the vision tower's rotary positions."""
    (rows, columns), m = grid.merged, grid.merge_size
    places = np.indices((grid.rows, grid.columns), dtype=np.int64)  # [2, H, W]
    ordered: Ints = places.reshape(2, rows, m, columns, m).transpose(1, 3, 2, 4, 0).reshape(-1, 2)
    return ordered


def windows(grid: Grid, window_patches: int) -> tuple[Ints, Ints]:
    """Which patches attend to each other in windowed attention, and the way back.

    Returns the patches of each window [windows, window_patches], −1 where a window reaches over the edge, and for
    each patch its place [patches] in that array flattened. Windows go row by row, as Hugging Face's do.
    """
    m = grid.merge_size
    side = math.isqrt(window_patches) // m  # merged tokens along the edge of a window
    rows, columns = grid.merged
    down, across = -(-rows // side), -(-columns // side)
    tokens = np.full((down * side, across * side), -1, dtype=np.int64)
    tokens[:rows, :columns] = np.arange(grid.num_tokens).reshape(rows, columns)
    in_windows = tokens.reshape(down, side, across, side).transpose(0, 2, 1, 3).reshape(-1, side * side, 1)
    patches = np.where(in_windows < 0, -1, in_windows * m**2 + np.arange(m**2)).reshape(-1, window_patches)
    filled = np.flatnonzero(patches >= 0)
    slots = np.empty(len(filled), dtype=np.int64)
    slots[patches.reshape(-1)[filled]] = filled
    return patches, slots


def token_positions(grid: Grid) -> Ints:
    """[3, N]: (t, h, w) of each merged token for the language model's M-RoPE, counted from the image's first."""
    rows, columns = grid.merged
    positions = np.indices((1, rows, columns), dtype=np.int64).reshape(3, -1)
    return positions


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _whole(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 30:
        raise setting_fault(key, value)
    return value
