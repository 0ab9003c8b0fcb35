"""The first selection, inside the vision tower: after some of its blocks only the tokens that it picks go on.

They are picked by residual energy (`residual_select`) of the rows of that block, without text: a gain of 1. Each stands
for the dropped tokens that are most like it (`kept_counts`), and the logarithm of that count is added to its scores as
a key in every later block (proportional attention, arXiv 2210.09461). A class token always goes on, and counts 1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from resprune.exporter.components import Component, Tower
from resprune.exporter.families.tiles import PackedTiles
from resprune.exporter.trace.tracer import OPSET
from resprune.exporter.verify.early import early_reference, selecting
from resprune.graphs import choose_form
from resprune.graphs.functions import (
    DOMAIN,
    EARLY_SELECT,
    KEPT_COUNTS,
    VERSION,
    kept_counts_function,
    residual_select_function,
)
from resprune.method import Selection
from resprune.runtime.bundle.manifest import Early, TensorSpec
from resprune.runtime.errors import ResPruneError

SETTING = re.compile(r"(\d+)(%?):(\d+)(%?)")


@dataclass(frozen=True)
class Request:
    """What `--early LAYER:TOKENS` asks for; a number with a percent sign is a share of the blocks, or of the tokens."""

    layer: int
    layer_share: bool
    tokens: int
    tokens_share: bool

    @staticmethod
    def parse(text: str) -> Request:
        """`8:288` or `33%:50%`; `ResPruneError` for anything else."""
        found = SETTING.fullmatch(text)
        if found is None:
            raise ResPruneError(
                f"--early {text} is not LAYER:TOKENS, as in 8:288, or shares of both, as in 33%:50%"
            )
        layer, of_layers, tokens, of_tokens = found.groups()
        return Request(int(layer), bool(of_layers), int(tokens), bool(of_tokens))

    def of(self, component: Component, title: str) -> Early:
        """The blocks and tokens that it comes to; `ResPruneError` where the tower of family `title` cannot do it."""
        tower, blocks = component.tower, len(component.layers)
        if tower is None:
            raise ResPruneError(
                f"--early is not built for the vision tower of {title}: its blocks see the image in windows, or hand "
                "planes on from the middle; leave it out"
            )
        layer = max(1, round(self.layer * blocks / 100)) if self.layer_share else self.layer
        tokens = max(1, round(self.tokens * tower.tokens / 100)) if self.tokens_share else self.tokens
        last = min(blocks, *tower.layers) - 1
        if last < 1:
            raise ResPruneError(
                f"--early needs a block before it, and the projector takes hidden state {min(tower.layers)} of the "
                f"tower's {blocks} blocks; leave it out"
            )
        if not 1 <= layer <= last:
            taken = ", ".join(map(str, tower.layers))
            raise ResPruneError(
                f"--early after block {layer}: give 1 to {last}, for the tower has {blocks} blocks and the projector "
                f"takes hidden states {taken}"
            )
        if not 1 <= tokens < tower.tokens:
            raise ResPruneError(
                f"--early keeps {tokens} of the {tower.tokens} tokens of an image or tile; give 1 to {tower.tokens - 1}"
            )
        return Early(layer, tokens, tower.tokens)


def with_early(component: Component, early: Early, mode: FakeTensorMode) -> Component:
    """The same vision component with the first selection in its tower.

    `image_features` keep their places in the image, with zeros where a token was dropped. Two outputs more:
    `token_mask` [B, N] bool, which of them are left, and `early_indices` [tiles, C] int64 ascending, the patches of
    each tile that went on. A tower over whole images has one tile an image.
    """
    tower = component.tower
    assert tower is not None
    packed = component.module if isinstance(component.module, PackedTiles) else None
    tiles: Any = component.module if packed is None else packed.tiles
    rows = _Rows(tiles, component.layers, tower, early)
    size = component.inputs[0].shape[2:]
    with mode:
        kept = rows(torch.empty(1, 3, *map(int, size)))[0].shape[1]
    if kept not in (early.tokens, tower.leading + early.tokens):
        raise ResPruneError(
            "--early needs every patch of the tower, and the checkpoint leaves some out; correct "
            "vision_feature_select_strategy in its config.json (full for a tower without a class token)"
        )
    module = _Grid(rows) if packed is None else _Packed(rows, packed.further)
    features, *_ = component.outputs
    tiles_axis = component.inputs[0].shape[0]
    outputs = (
        features,
        TensorSpec("token_mask", "bool", features.shape[:2]),
        TensorSpec("early_indices", "int64", (tiles_axis, early.tokens)),
    )
    form = choose_form(early.tokens, early.of, tower.hidden_size)
    functions = (
        residual_select_function(Selection(k=early.tokens, form=form), opset=OPSET, name=EARLY_SELECT),
        kept_counts_function(opset=OPSET),
    )
    return replace(
        component,
        module=module,
        outputs=outputs,
        reference=early_reference(component, tower, early),
        functions=functions,
        early=True,
    )


class _Rows(nn.Module):
    """pixel_values [T, 3, H, W] → rows [T, C, D] of the tokens that went on, and which they are [T, C], ascending.

    Where the projector takes a class token too, its row stands before the others.
    """

    def __init__(self, rows: nn.Module, blocks: Sequence[nn.Module], tower: Tower, early: Early) -> None:
        super().__init__()
        self.rows = rows
        self.blocks = tuple(blocks)
        self.tower = tower
        self.early = early

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        picks: list[Tensor] = []

        def select(hidden: Tensor) -> tuple[Tensor, Tensor]:
            hidden, bias, kept = self._select(hidden)
            picks.append(kept)
            return hidden, bias

        with selecting(self.blocks, self.early.layer, select):
            (rows,) = self.rows(pixel_values)
        return rows, picks[0]

    def _select(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [T, S, H] → those that go on, what is added to their scores as keys, and the tokens kept."""
        leading, count = self.tower.leading, self.early.tokens
        first, patches = hidden[:, :leading], hidden[:, leading:]  # [T, P, H]
        tiles, total = patches.shape[:2]
        gain = patches.new_ones((tiles, total))
        every = torch.ones((tiles, total), dtype=torch.bool, device=hidden.device)
        order = _node(EARLY_SELECT, [patches, gain, every], (tiles, count), k=count)
        # As float32, exact to 2²⁴: TensorRT's TopK does not take int64.
        kept = order.float().sort(dim=1).values.long()
        counts = _node(KEPT_COUNTS, [patches, every, kept], (tiles, count))
        bias = torch.cat([patches.new_zeros((tiles, leading)), counts.float().log()], dim=1)
        places = kept + total * torch.arange(tiles, device=hidden.device)[:, None]
        rows = nn.functional.embedding(places, patches.reshape(tiles * total, -1))
        return torch.cat([first, rows], dim=1), bias[:, None, None], kept


def _node(op: str, inputs: Sequence[Tensor], shape: Sequence[Any], **attributes: Any) -> Tensor:
    """One node of an op of ours, which gives int64."""
    result: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{op}",
        inputs,
        {**attributes, "plugin_namespace": DOMAIN},
        dtype=torch.int64,
        shape=shape,
        version=VERSION,
    )
    return result


class _Grid(nn.Module):
    """pixel_values [B, 3, H, W] → image_features [B, N, D], token_mask [B, N], early_indices [B, C]."""

    def __init__(self, rows: _Rows) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, kept = self.rows(pixel_values)
        table, slots = _table(rows, kept, self.rows.early.of)
        return nn.functional.embedding(slots, table), slots < table.shape[0] - 1, kept


class _Packed(nn.Module):
    """The inputs of `PackedTiles` → image_features [B, N, D], token_mask [B, N], early_indices [T, C].

    A token that is a weighted sum of rows is the weighted mean of those that are left, and dropped with the last.
    """

    def __init__(self, rows: _Rows, further: nn.Parameter | None) -> None:
        super().__init__()
        self.rows = rows
        self.further = further

    def forward(
        self, pixel_values: Tensor, pack_indices: Tensor, pack_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, kept = self.rows(pixel_values)
        table, slots = _table(rows, kept, self.rows.early.of)
        dropped, slots = table.shape[0] - 1, slots.flatten()
        if self.further is not None:
            table = torch.cat([table, self.further[None]])
            slots = torch.cat([slots, torch.full_like(slots[:1], dropped + 1)])
        indices = torch.where(pack_indices < 0, dropped, slots[pack_indices.clamp(min=0)])
        present = indices != dropped
        if pack_weights is None:
            return nn.functional.embedding(indices, table), present, kept
        weights = torch.where(present, pack_weights, 0.0)
        total = weights.sum(2)
        weights = weights / torch.where(total > 0, total, 1.0)[:, :, None]
        taken = zip(indices.unbind(2), weights.unbind(2), strict=True)
        first, *others = (
            nn.functional.embedding(index, table) * weight[:, :, None] for index, weight in taken
        )
        return sum(others, first), total > 0, kept


def _table(rows: Tensor, kept: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The rows of all tiles with a row of zeros behind them, and where in it each of a tile's tokens is, [T, N].

    `rows` [T, L + C, D] are those of L leading tokens, if any, and of the tokens `kept` [T, C] of `count`; dropped ones
    are at the row of zeros.
    """
    tiles, length, size = rows.shape
    leading = length - kept.shape[1]
    table = torch.cat([rows.reshape(tiles * length, size), torch.zeros_like(rows[0, :1])])
    places = torch.arange(tiles * length, device=rows.device).reshape(tiles, length)
    dropped = torch.full_like(places[:, :1], tiles * length).expand(-1, count)
    slots = dropped.scatter(1, kept, places[:, leading:])
    return table, torch.cat([places[:, :leading], slots], dim=1)
