"""The first selection, inside the vision tower: after some of its blocks only the tokens that it picks go on.

They are picked by residual energy (`residual_select`) of the rows of that block, without text: a gain of 1. Each stands
for the dropped tokens that are most like it (`kept_counts`), and the logarithm of that count is added to its scores as
a key in every later block (proportional attention, arXiv 2210.09461). A class token always goes on, and counts 1. Where
several rows become one token they go on together, and stand together: the token is the mean of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from resprune.exporter.components import Component, Sizes, Tower
from resprune.exporter.families.tiles import PackedTiles
from resprune.exporter.trace.tracer import OPSET
from resprune.exporter.verify.early import early_reference
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
from resprune.names import EARLY_AXIS, EARLY_INDICES, EARLY_RANKS, TOKEN_MASK
from resprune.runtime.bundle.manifest import Early, TensorSpec
from resprune.runtime.errors import ResPruneError


def with_early(component: Component, early: Early, mode: FakeTensorMode) -> Component:
    """The same vision component with the first selection in its tower.

    Features keep their places in the image, with zeros where a token was dropped. Two outputs more: `token_mask` [B, N]
    bool, which of them are left, and `early_indices` [tiles, C] int64 ascending, the tokens of each tile that went on.
    A tower over whole images has one tile an image. Where N is the image's own there is one input more, `early_ranks`
    [C] int64: 0, 1 … C − 1, the places of those that go on in the order of picks.
    """
    tower = component.tower
    assert tower is not None
    packed = component.module if isinstance(component.module, PackedTiles) else None
    selecting = _Selecting(
        component.module if packed is None else packed.tiles, component.layers, tower, early
    )
    if not tower.varies:
        with mode:
            ((rows, *_), _) = selecting(torch.empty(1, 3, *map(int, component.inputs[0].shape[2:])))
        if rows.shape[1] not in (early.tokens, tower.leading + early.tokens):
            raise ResPruneError(
                "--early needs every patch of the tower, and the checkpoint leaves some out; correct "
                "vision_feature_select_strategy in its config.json (full for a tower without a class token)"
            )
    features = component.outputs
    indices = (1, EARLY_AXIS) if tower.varies else (component.inputs[0].shape[0], early.tokens)
    ranks = TensorSpec(EARLY_RANKS, "int64", (EARLY_AXIS,))

    def samples(sizes: Sizes, generator: torch.Generator) -> tuple[Tensor, ...]:
        inputs = component.samples(sizes, generator)
        count = inputs[0].shape[0] // tower.group
        # However many were asked for: else an image as small as these may lose none.
        return *inputs, torch.arange(min(early.left(count), count // 2))

    form = choose_form(early.tokens, early.of, tower.hidden_size)
    functions = (
        residual_select_function(Selection(k=early.tokens, form=form), opset=OPSET, name=EARLY_SELECT),
        kept_counts_function(opset=OPSET),
    )
    return replace(
        component,
        module=_Whole(selecting) if packed is None else _Packed(selecting, packed.further),
        inputs=(*component.inputs, ranks) if tower.varies else component.inputs,
        samples=samples if tower.varies else component.samples,
        outputs=(
            *features,
            TensorSpec(TOKEN_MASK, "bool", features[0].shape[:2]),
            TensorSpec(EARLY_INDICES, "int64", indices),
        ),
        reference=early_reference(component, tower, early),
        functions=functions,
        early=True,
    )


class _Selecting(nn.Module):
    """Inputs of `module` → its outputs, each [T, C, D], of the tokens that went on, and which they are [T, C].

    These ascend. Where the projector takes a class token too, its row stands before the others. A plane of an earlier
    hidden state has the rows of all tokens.
    """

    def __init__(self, module: nn.Module, blocks: Sequence[nn.Module], tower: Tower, early: Early) -> None:
        super().__init__()
        self.module = module
        self.blocks = tuple(blocks)
        self.tower = tower
        self.early = early

    def forward(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        inputs, ranks = (inputs[:-1], inputs[-1]) if self.tower.varies else (inputs, None)
        found: list[Any] = []

        def called(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden = args[0]
            if not found:
                hidden, bias, kept = self._select(hidden, ranks)
                found.extend((self.tower.shared(args[1:], kept, bias), kept))
            return hidden, *found[0]

        with ExitStack() as stack:
            for block in self.blocks[self.early.layer :]:
                stack.callback(block.register_forward_pre_hook(called).remove)
            outputs = self.module(*inputs)
        return outputs, found[1]

    def _select(self, hidden: Tensor, ranks: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [T, S, H] → those that go on, what is added to their scores as keys, and the tokens kept."""
        leading, group = self.tower.leading, self.tower.group
        states = hidden.reshape(-1, *hidden.shape[-2:])
        first, patches = states[:, :leading], states[:, leading:]
        tiles, size = patches.shape[0], patches.shape[2]
        tokens = patches.reshape(tiles, -1, group, size)  # [T, N, G, H]
        total = tokens.shape[1]
        means = tokens.mean(2) if group > 1 else patches
        gain = means.new_ones((tiles, total))
        every = torch.ones((tiles, total), dtype=torch.bool, device=hidden.device)
        count = self.early.tokens
        order = _node(EARLY_SELECT, [means, gain, every], (tiles, count), k=count)
        if ranks is not None:
            order, count = order.index_select(1, ranks), ranks.shape[0]
        # As float32, exact to 2²⁴: TensorRT's TopK does not take int64.
        kept = order.float().sort(dim=1).values.long()
        counts = _node(KEPT_COUNTS, [means, every, kept], (tiles, count))
        logs = counts.float().log()[:, :, None].expand(-1, -1, group).flatten(1)  # [T, C · G]
        bias = torch.cat([means.new_zeros((tiles, leading)), logs], dim=1)
        places = kept + total * torch.arange(tiles, device=hidden.device)[:, None]
        rows = nn.functional.embedding(places, tokens.reshape(tiles * total, group * size))
        rows = torch.cat([first, rows.reshape(tiles, count * group, size)], dim=1)
        return rows.reshape(*hidden.shape[:-2], *rows.shape[1:]), bias[:, None, None], kept


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


class _Whole(nn.Module):
    """Inputs of an image each → features and planes [B, N, D], token_mask [B, N], early_indices [B, C]."""

    def __init__(self, selecting: _Selecting) -> None:
        super().__init__()
        self.selecting = selecting

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        (rows, *planes), kept = self.selecting(*inputs)
        tower, layer = self.selecting.tower, self.selecting.early.layer
        slots = _slots(rows, kept, inputs[0].shape[0] // tower.group if tower.varies else tower.tokens)
        table = _table(rows)
        left = slots < table.shape[0] - 1
        features = [nn.functional.embedding(slots, table)]
        for plane, state in zip(planes, tower.planes, strict=True):
            if state > layer:
                features.append(nn.functional.embedding(slots, _table(plane)))
            else:  # it has the rows of every token
                features.append(torch.where(left[:, :, None], plane, 0.0))
        return *features, left, kept


class _Packed(nn.Module):
    """The inputs of `PackedTiles` → image_features [B, N, D], token_mask [B, N], early_indices [T, C].

    A token that is a weighted sum of rows is the weighted mean of those that are left, and dropped with the last.
    """

    def __init__(self, selecting: _Selecting, further: nn.Parameter | None) -> None:
        super().__init__()
        self.selecting = selecting
        self.further = further

    def forward(
        self, pixel_values: Tensor, pack_indices: Tensor, pack_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        (rows,), kept = self.selecting(pixel_values)
        table, slots = _table(rows), _slots(rows, kept, self.selecting.tower.tokens).flatten()
        dropped = table.shape[0] - 1
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


def _table(rows: Tensor) -> Tensor:
    """Rows [T, L, D] of all tiles with a row of zeros behind them, [T · L + 1, D]."""
    return torch.cat([rows.flatten(0, 1), torch.zeros_like(rows[0, :1])])


def _slots(rows: Tensor, kept: Tensor, count: int) -> Tensor:
    """Where in `_table(rows)` each of a tile's tokens is, [T, N]; dropped ones are at the row of zeros.

    `rows` [T, L + C, D] are those of L leading tokens, if any, and of the tokens `kept` [T, C] of `count`.
    """
    tiles, length = rows.shape[:2]
    leading = length - kept.shape[1]
    places = torch.arange(tiles * length, device=rows.device).reshape(tiles, length)
    dropped = torch.full_like(places[:, :1], tiles * length).expand(-1, count)
    slots = dropped.scatter(1, kept, places[:, leading:])
    return torch.cat([places[:, :leading], slots], dim=1)
