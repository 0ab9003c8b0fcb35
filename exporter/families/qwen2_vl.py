"""Qwen2.5-VL, and Qwen2-VL, whose tower is the same without windows: images of any size, and M-RoPE.

One vision graph serves every grid. Whatever depends on the grid alone comes in as integers that the runtime computes
(runtime/families/qwen2_vl.py). Rows stay in merge order from end to end: windowed attention gathers them into its
windows and back, full attention does not mind the order, and the merger finds its four rows side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_window_index

from resprune.exporter.checkpoint.checkpoint import Checkpoint, config_faults
from resprune.exporter.checkpoint.side_files import image_processor_config
from resprune.exporter.components import Component, Components, Sizes, Tower
from resprune.exporter.split import assemble, read_config, weightless_model
from resprune.exporter.trace.attention import grouped_attention
from resprune.names import IMAGE_FEATURES, PLANE_FEATURES, VISION_ENCODER
from resprune.runtime.bundle.manifest import TensorSpec
from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.preprocessor import PreparedImage
from resprune.runtime.families.qwen2_vl import (
    DynamicResolution,
    Grid,
    patch_positions,
    token_positions,
    windows,
)

MODELS: dict[str, tuple[Any, Any]] = {
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
}

Heads = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values of the patches, [P, H, d] each."""
Window = tuple[Tensor | None, Tensor | None]
"""`window_patches` and `window_slots` as `_Vision` takes them; None of a tower without windows."""

MAX_SIDE = 16
"""Merged tokens a side of a window, of which Qwen2.5-VL's have 4: the comparison's images hold two and more."""


class _Vision(nn.Module):
    """The patches of one image [P, C·T·p·p] in merge order → image_features [1, N, D], N = P / merge_size².

    `patch_positions` [P, 2] int64 are the row and column of each patch; for a tower with windows, `window_patches`
    [W, L] int64 are the patches of each window (−1: none) and `window_slots` [P] int64 the place of each patch in it.
    """

    def __init__(self, tower: Any, windowed: frozenset[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.tower = tower
        # No ModuleList: the weights are the tower's, under its names.
        self.blocks = tuple(
            Block(block, index in windowed, dtype) for index, block in enumerate(tower.blocks)
        )

    def forward(
        self,
        pixel_values: Tensor,
        patch_positions: Tensor,
        window_patches: Tensor | None = None,
        window_slots: Tensor | None = None,
    ) -> tuple[Tensor]:
        window = (window_patches, window_slots)
        # The convolution's kernel is as large as its input, so it is a product with the flattened kernel.
        hidden = nn.functional.linear(pixel_values, self.tower.patch_embed.proj.weight.flatten(1))  # [P, C]
        rotary = self.tower.rotary_pos_emb(hidden, patch_positions)
        for block in self.blocks:
            hidden = block(hidden, rotary, window)
        return (self.tower.merger(hidden)[None],)


class Block(nn.Module):
    """One block of the tower over the patches [P, C].

    Windowed attention sees the L patches of a window and nothing else, so no mask is larger than [W, 1, 1, L]. Full
    attention goes head by head: its scores, P² numbers a head, are by far the largest thing in the graph, and no two
    heads need theirs at the same time.
    """

    def __init__(self, block: Any, windowed: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.block = block
        self.windowed = windowed
        self.dtype = dtype

    def forward(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], window: Window, bias: Tensor | None = None
    ) -> Tensor:
        """`bias` [P] is added to the scores of each patch as a key."""
        hidden = hidden + self._attention(self.block.attn, self.block.norm1(hidden), rotary, window, bias)
        mixed: Tensor = hidden + self.block.mlp(self.block.norm2(hidden))
        return mixed

    def _attention(
        self,
        layer: Any,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        window: Window,
        bias: Tensor | None,
    ) -> Tensor:
        attend: Any = self._windowed if self.windowed else self._full
        query, key, value = layer.qkv(hidden).unflatten(1, (3, layer.num_heads, -1)).unbind(1)
        query, key = apply_rotary_pos_emb_vision(query, key, *rotary)
        mixed: Tensor = layer.proj(attend((query, key, value), layer.scaling, bias, window))
        return mixed

    def _windowed(
        self, heads: Heads, scaling: float, bias: Tensor | None, window: tuple[Tensor, Tensor]
    ) -> Tensor:
        patches, slots = window
        places = patches.clamp(min=0)
        query, key, value = (
            nn.functional.embedding(places, rows.flatten(1))
            .reshape(*places.shape, *rows.shape[1:])
            .transpose(1, 2)
            for rows in heads
        )  # [W, H, L, d]
        seen = 0.0 if bias is None else bias[places]
        mask = torch.where(patches < 0, torch.finfo(torch.float32).min, seen)[:, None, None, :]
        mixed = grouped_attention(query, key, value, mask, scaling, self.dtype)  # [W, L, H, d]
        return nn.functional.embedding(slots, mixed.flatten(2).flatten(0, 1))  # [P, C]

    def _full(self, heads: Heads, scaling: float, bias: Tensor | None, window: Window) -> Tensor:
        query, key, value = heads
        rows = (query * scaling).to(self.dtype).transpose(0, 1)  # [H, P, d]
        columns, mixed = key.to(self.dtype).permute(1, 2, 0), value.to(self.dtype).transpose(0, 1)
        every = []
        for head in range(query.shape[1]):
            scores = torch.matmul(rows[head], columns[head]).float()  # [P, P]
            weights = torch.softmax(scores if bias is None else scores + bias, dim=-1)
            every.append(torch.matmul(weights.to(self.dtype), mixed[head]))
        return torch.cat(every, dim=-1).float()  # [P, C]


def split_model(checkpoint: Checkpoint, dtype: torch.dtype, mode: FakeTensorMode) -> Components:
    """The three components of a checkpoint, weightless; `ResPruneError` for a config that they cannot carry."""
    config_class, model_class = MODELS[checkpoint.config["model_type"]]
    config = read_config(checkpoint, config_class)
    processor = DynamicResolution.from_config(image_processor_config(checkpoint))
    check_processor(processor, config.vision_config)
    model = weightless_model(checkpoint, model_class, config, dtype, mode)
    with config_faults(checkpoint):
        vision = _vision_component(model, config, dtype)
    vision = replace(vision, tower=tower_facts(config.vision_config, processor.max_tokens))
    return assemble(
        checkpoint,
        model,
        vision,
        dtype,
        max_tokens=processor.max_tokens,
        images=lambda inputs: [placed(grid_of(inputs, config.vision_config.spatial_merge_size))],
    )


def check_processor(processor: DynamicResolution, config: Any) -> None:
    """The image processor must cut the patches that the tower was made for."""
    for ours, theirs in (
        ("patch_size", "patch_size"),
        ("temporal_patch_size", "temporal_patch_size"),
        ("merge_size", "spatial_merge_size"),
    ):
        if getattr(processor, ours) != getattr(config, theirs):
            raise ResPruneError(
                f"the checkpoint's image processor has {ours} {getattr(processor, ours)} and its vision tower "
                f"{getattr(config, theirs)}; they belong to different models"
            )


def _vision_component(model: Any, config: Any, dtype: torch.dtype) -> Component:
    vision = config.vision_config
    merge = vision.spatial_merge_size
    windowed: frozenset[int] = frozenset()
    if vision.model_type == "qwen2_5_vl_vision":
        windowed = frozenset(range(vision.depth)) - {
            block % vision.depth for block in vision.fullatt_block_indexes
        }
    side = 1 if not windowed else vision.window_size // merge // vision.patch_size
    if side < 1:
        raise ResPruneError(f"the vision tower's window of {vision.window_size} pixels holds no merged token")
    if side > MAX_SIDE:
        raise ResPruneError(
            f"the vision tower's windows of {vision.window_size} pixels hold {side} merged tokens a side, and the "
            f"graph is compared in whole windows of at most {MAX_SIDE}; correct window_size in config.json"
        )
    length = (side * merge) ** 2
    module = _Vision(model.model.visual, windowed, dtype)
    if not windowed:
        return patches_component(model, module, side)
    further = (
        TensorSpec("window_patches", "int64", ("num_windows", length)),
        TensorSpec("window_slots", "int64", ("num_patches",)),
    )
    return patches_component(model, module, side, further, lambda grid: windows(grid, length))


def patches_component(
    model: Any,
    module: Any,
    side: int,
    further: tuple[TensorSpec, ...] = (),
    arrays: Callable[[Grid], tuple[npt.NDArray[Any], ...]] = lambda grid: (),
    planes: int = 0,
) -> Component:
    """The vision component of a `module` with `blocks` over the patches of one image and their positions.

    `further` are its inputs beside those two, which `arrays` makes of a grid. It is compared on grids that cut what is
    `side` merged tokens wide, in both directions.
    """
    vision = model.config.vision_config
    merge = vision.spatial_merge_size
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    inputs = (
        TensorSpec("pixel_values", "float32", ("num_patches", pixels)),
        TensorSpec("patch_positions", "int64", ("num_patches", 2)),
        *further,
    )
    shape = (1, "num_tokens", model.config.text_config.hidden_size)
    names = [IMAGE_FEATURES, *map(PLANE_FEATURES.format, range(planes))]
    outputs = tuple(TensorSpec(name, "float32", shape) for name in names)

    def samples(sizes: Sizes, generator: torch.Generator) -> tuple[Tensor, ...]:
        grid = Grid(merge * (side + sizes["batch_size"]), merge * (2 * side + 1), merge)
        patches = torch.randn(grid.rows * grid.columns, pixels, generator=generator)
        facts = (patch_positions(grid), *arrays(grid))
        return (patches, *(torch.from_numpy(np.ascontiguousarray(array)) for array in facts))

    return Component(VISION_ENCODER, module, inputs, outputs, samples, _reference, module.blocks)


def tower_facts(config: Any, max_tokens: int) -> Tower:
    """What a selection inside such a tower must know of it: rows of a token are side by side, in windows or not."""
    group = config.spatial_merge_size**2
    size = config.embed_dim if config.model_type == "qwen2_vl_vision" else config.hidden_size
    return Tower(
        tokens=max_tokens,
        hidden_size=size,
        layers=(config.depth,),
        tower=lambda model: model.model.visual,
        projectors=lambda model: [model.model.visual.merger],
        places=_places,
        group=group,
        varies=True,
        shared=partial(_left, group),
        attended=_attended,
    )


def _left(
    group: int, shared: tuple[tuple[Tensor, Tensor], Window], kept: Tensor, bias: Tensor
) -> tuple[tuple[Tensor, ...], Window, Tensor]:
    """Rotary angles and windows of the patches that go on; windows keep their places, and lack those that do not."""
    rotary, (patches, slots) = shared
    rows = (kept[0][:, None] * group + torch.arange(group, device=kept.device)).flatten()
    if patches is not None and slots is not None:
        numbers = torch.full_like(slots, -1).scatter(0, rows, torch.arange(rows.shape[0], device=kept.device))
        patches = torch.where(patches < 0, -1, numbers[patches.clamp(min=0)])
        slots = slots[rows]
    return tuple(nn.functional.embedding(rows, angles) for angles in rotary), (patches, slots), bias.flatten()


def _attended(kwargs: Mapping[str, Any], rows: Tensor, bias: Tensor) -> Mapping[str, Any]:
    """The same for the attention of transformers: its windows, which are of consecutive rows, as a mask."""
    (rows,) = rows
    window = torch.searchsorted(kwargs["cu_seqlens"].long(), rows, right=True)
    return {
        **kwargs,
        "cu_seqlens": torch.tensor([0, len(rows)], device=rows.device),
        "position_embeddings": tuple(angles[rows] for angles in kwargs["position_embeddings"]),
        "position_bias": bias.masked_fill(window[:, None] != window, -torch.inf),
    }


def _places(model: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    """Where the model's tower has the patches of each token, which one with windows goes through by them: [N, G]."""
    config = model.config.vision_config
    grid = grid_of(inputs, config.spatial_merge_size)
    tokens: Tensor = torch.arange(grid.num_tokens)
    if hasattr(config, "window_size"):
        sizes = config.spatial_merge_size, config.window_size, config.patch_size
        order, _ = get_vision_window_index(torch.tensor([grid.thw]), *sizes)
        tokens = order.argsort()
    group = int(config.spatial_merge_size) ** 2
    return tokens[:, None] * group + torch.arange(group)


def _reference(model: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """By the model's own code, with the planes that it gives."""
    grid = grid_of(inputs, model.config.vision_config.spatial_merge_size)
    features = model.get_image_features(inputs[0], torch.tensor([grid.thw]))
    planes = getattr(features, "deepstack_features", ())
    return tuple(torch.stack(list(plane)) for plane in (features.pooler_output, *planes))


def grid_of(inputs: tuple[Tensor, ...], merge_size: int) -> Grid:
    """The grid that the vision graph's inputs are of."""
    rows, columns = (int(count) + 1 for count in inputs[1].amax(dim=0))
    return Grid(rows, columns, merge_size)


def placed(grid: Grid) -> PreparedImage:
    """Where an image's tokens stand in a prompt."""
    return PreparedImage.one_span({}, token_positions(grid), max(grid.merged))
