"""The vision component of families that cut images into tiles, whose rows are packed into one sequence an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from resprune.exporter.components import Component, Reference, Sizes, Tower
from resprune.exporter.families.llava import tower_output
from resprune.names import IMAGE_FEATURES, VISION_ENCODER
from resprune.runtime.bundle.manifest import TensorSpec
from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.preprocessor import PreparedImage
from resprune.runtime.families.tiles import TileProcessor, pack


class PackedTiles(nn.Module):
    """pixel_values [tiles, 3, H, W], pack_indices [B, N] → image_features [B, N, D].

    `tiles` makes P rows of a tile, [tiles, P, D]. Indices count the rows of all tiles, then the `further` row [D] if
    there is one; below 0 is padding and gives a row of zeros. With pack_weights [B, N, T] a token is the sum of T
    rows, each times its weight, and pack_indices are [B, N, T].
    """

    def __init__(self, tiles: nn.Module, further: nn.Parameter | None = None) -> None:
        super().__init__()
        self.tiles = tiles
        self.further = further

    def forward(
        self, pixel_values: Tensor, pack_indices: Tensor, pack_weights: Tensor | None = None
    ) -> tuple[Tensor]:
        rows = self.tiles(pixel_values)[0].flatten(0, 1)  # [tiles · P, D]
        zero = torch.zeros_like(rows[:1])
        behind = [zero] if self.further is None else [self.further[None], zero]
        table = torch.cat([rows, *behind])
        # Not left to the meaning of a negative index, on which runtimes differ.
        indices = torch.where(pack_indices < 0, table.shape[0] - 1, pack_indices)
        if pack_weights is None:
            return (nn.functional.embedding(indices, table),)
        # One after the other: all T at once would be T times as large as what they sum to.
        taken = zip(indices.unbind(2), pack_weights.unbind(2), strict=True)
        first, *others = (
            nn.functional.embedding(index, table) * weight[:, :, None] for index, weight in taken
        )
        return (sum(others, first),)


def tiles_component(
    rows: nn.Module,
    blocks: Sequence[nn.Module],
    processor: TileProcessor,
    prepare: Callable[[Any], PreparedImage],
    features: Callable[[Any, Tensor], Tensor],
    tower: Tower,
    mode: FakeTensorMode,
) -> Component:
    """The vision component of images that are nothing but their tiles in order.

    `rows` makes a tile's rows; `blocks` are its repeated layers; `prepare` makes a `PreparedImage` of processed tiles
    [tiles, 3, H, W]; `features` is what Hugging Face's whole model makes of tiles: [tiles, P, D]; `tower` is for a
    selection inside it. `ResPruneError` where the tower's rows are not as many as the runtime counts.
    """
    tile = processor.tile
    tokens, hidden_size = tower_output(rows, (tile, tile), mode)
    if tokens != processor.tokens:
        raise ResPruneError(
            f"the vision tower gives {tokens} rows a tile where {processor.tokens} are packed; the checkpoint's "
            "config.json does not fit its image processor"
        )

    def samples(sizes: Sizes, generator: torch.Generator) -> tuple[Tensor, ...]:
        images = [
            prepare(torch.randn((count, 3, tile, tile), generator=generator).numpy())
            for count in _tile_counts(sizes["batch_size"])
        ]
        batch = pack(images, tokens)
        return torch.from_numpy(batch["pixel_values"]), torch.from_numpy(batch["pack_indices"])

    def reference(model: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        pixel_values, pack_indices = inputs
        counts = ((pack_indices >= 0).sum(dim=1) // tokens).tolist()
        of_images = [of_one.flatten(0, 1) for of_one in torch.split(features(model, pixel_values), counts)]
        return (nn.utils.rnn.pad_sequence(of_images, batch_first=True),)

    inputs = (
        TensorSpec("pixel_values", "float32", ("num_tiles", 3, tile, tile)),
        TensorSpec("pack_indices", "int64", ("batch_size", "num_tokens")),
    )
    outputs = (TensorSpec(IMAGE_FEATURES, "float32", ("batch_size", "num_tokens", hidden_size)),)
    module = PackedTiles(rows)
    judge: Reference = reference
    return Component(VISION_ENCODER, module, inputs, outputs, samples, judge, tuple(blocks), tower=tower)


def tile_images(
    tokens: int, prepare: Callable[[Any], PreparedImage], inputs: tuple[Tensor, ...]
) -> list[PreparedImage]:
    """Where the tokens of the images stand whose tiles have `tokens` each (`Components.images`)."""
    counts = ((inputs[1] >= 0).sum(dim=1) // tokens).tolist()
    return [prepare(np.empty((count, 0))) for count in counts]


def _tile_counts(images: int) -> list[int]:
    """Tiles of as many images to compare with, unlike ones side by side."""
    return [(3, 1, 5)[image % 3] for image in range(images)]
