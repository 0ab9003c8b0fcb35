"""Images for Qwen3-VL: as Qwen2-VL's, for a tower whose learned positions are interpolated to any grid."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from resprune.runtime.bundle.files import Bundle
from resprune.runtime.bundle.manifest import Range
from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.image import Box
from resprune.runtime.families.preprocessor import Arrays, PreparedImage
from resprune.runtime.families.qwen2_vl import (
    DynamicResolution,
    Floats,
    Grid,
    Ints,
    patch_positions,
    token_positions,
)

POSITIONS = 2304
"""num_position_embeddings of a config that leaves it out, as in transformers 5."""


@dataclass(frozen=True)
class InterpolatedResolution:
    """The grid of `resolution`, and where each patch falls among the tower's `side` × `side` learned positions."""

    resolution: DynamicResolution
    side: int
    max_batch: int | None = 1

    @staticmethod
    def from_bundle(bundle: Bundle) -> "InterpolatedResolution":
        """From the bundle's image processor and config."""
        resolution = DynamicResolution.from_bundle(bundle)
        return InterpolatedResolution(resolution, table_side(bundle.json("config.json")))

    def __call__(self, image: Image.Image) -> PreparedImage:
        """Patches, and what the graph reads of their grid; `offsets` [3, N] are (t, h, w) from the image's first."""
        patches, grid = self.resolution.patches(image)
        arrays = self.resolution.arrays(patches, grid)
        arrays["position_taps"], arrays["position_weights"] = position_taps(grid, self.side)
        return PreparedImage.one_span(arrays, token_positions(grid), max(grid.merged))

    @property
    def max_tokens(self) -> int:
        """As of the resolution, like all that follows."""
        return self.resolution.max_tokens

    def grid(self, image_size: tuple[int, int]) -> Grid:
        """The grid of an image of `image_size` (width, height)."""
        return self.resolution.grid(image_size)

    def batch(self, images: Sequence[PreparedImage]) -> Arrays:
        """Inputs of the vision graph, by name."""
        return self.resolution.batch(images)

    def axes(self, batch: Range, tokens: Range) -> dict[str, Range]:
        """How long the named axes of the vision graphs' inputs get."""
        return self.resolution.axes(batch, tokens)

    def boxes(self, image_size: tuple[int, int]) -> list[Box | None]:
        """Where each of the N tokens lies in an image of `image_size` (width, height)."""
        return self.resolution.boxes(image_size)


preprocessor = InterpolatedResolution.from_bundle


def table_side(config: dict[str, Any]) -> int:
    """The side of the square table of learned positions, from a config.json."""
    vision = config.get("vision_config")
    count = vision.get("num_position_embeddings", POSITIONS) if isinstance(vision, dict) else POSITIONS
    if type(count) is not int or not 1 <= count <= 1 << 24:
        raise ResPruneError(
            f"vision_config.num_position_embeddings in config.json should be a whole number from 1, not {count!r:.80}"
        )
    return int(count**0.5)


def position_taps(grid: Grid, side: int) -> tuple[Ints, Floats]:
    """The four learned positions about each patch, in merge order: [P, 4] int64, and their weights [P, 4] float32.

    Bilinear, corners aligned, in float32, as `transformers.vision_utils` computes them.
    """
    taps: list[Ints] = []
    weights: list[Floats] = []
    for place, size in zip(patch_positions(grid).T, (grid.rows, grid.columns), strict=True):
        source = place.astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))  # [P]
        floor = np.floor(source)
        near = floor.astype(np.int64)[:, None] + np.arange(2)  # [P, 2]
        distance = np.abs(source[:, None] - floor[:, None] - np.arange(2, dtype=np.float32))
        taps.append(np.clip(near, 0, side - 1))
        weights.append(np.maximum(np.float32(1) - distance, np.float32(0)))
    indices = (taps[0][:, :, None] * side + taps[1][:, None, :]).reshape(-1, 4)
    return indices, (weights[0][:, :, None] * weights[1][:, None, :]).reshape(-1, 4)
