"""Qwen3-VL: Qwen2-VL's way with images, learned positions that are interpolated, and DeepStack.

Some blocks of the tower go through mergers of their own; what these give is added to the hidden state after the first
layers of the language model, at the image's rows. They are the planes of the visual tokens.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from resprune.exporter.checkpoint.checkpoint import Checkpoint, config_faults
from resprune.exporter.checkpoint.side_files import image_processor_config
from resprune.exporter.components import Component, Components, Sizes
from resprune.exporter.families.qwen2_vl import Block, check_processor, grid_of, places_of, tower_facts
from resprune.exporter.language import called, read_past
from resprune.exporter.split import assemble, read_config, weightless_model
from resprune.names import PLANE_FEATURES
from resprune.runtime.bundle.manifest import TensorSpec
from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.qwen2_vl import DynamicResolution, Grid, patch_positions
from resprune.runtime.families.qwen3_vl import position_taps, table_side
from resprune.runtime.families.rotary import interleaved


class _Vision(nn.Module):
    """The patches of one image [P, C·T·p·p] in merge order → image_features [1, N, D] and its planes, each [1, N, D].

    `patch_positions` [P, 2] int64 are the row and column of each patch; `position_taps` [P, 4] int64 and
    `position_weights` [P, 4] float32 what its learned position is made of.
    """

    def __init__(self, tower: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.tower = tower
        self.blocks = tuple(Block(block, False, dtype) for block in tower.blocks)
        self.taken_after = tuple(tower.deepstack_visual_indexes)

    def forward(
        self,
        pixel_values: Tensor,
        patch_positions: Tensor,
        position_taps: Tensor,
        position_weights: Tensor,
    ) -> tuple[Tensor, ...]:
        # The convolution's kernel is as large as its input, so it is a product with the flattened kernel.
        embed = self.tower.patch_embed.proj
        hidden = nn.functional.linear(pixel_values, embed.weight.flatten(1), embed.bias)  # [P, C]
        hidden = hidden + (self.tower.pos_embed(position_taps) * position_weights[:, :, None]).sum(1)
        rotary = self.tower.rotary_pos_emb(hidden, patch_positions)
        planes: dict[int, Tensor] = {}
        for index, block in enumerate(self.blocks):
            hidden = block(hidden, rotary, (None, None))
            if index in self.taken_after:
                plane = self.taken_after.index(index)
                planes[plane] = self.tower.deepstack_merger_list[plane](hidden)[None]
        return (self.tower.merger(hidden)[None], *(planes[plane] for plane in sorted(planes)))


def split_model(checkpoint: Checkpoint, dtype: torch.dtype, mode: FakeTensorMode) -> Components:
    """The three components of a checkpoint, weightless; `ResPruneError` for a config that they cannot carry."""
    config = read_config(checkpoint, Qwen3VLConfig)
    vision = config.vision_config
    processor = DynamicResolution.from_config(image_processor_config(checkpoint))
    check_processor(processor, vision)
    taken_after = list(vision.deepstack_visual_indexes)
    if taken_after != sorted(set(taken_after)) or not all(0 <= layer < vision.depth for layer in taken_after):
        raise ResPruneError(
            f"deepstack_visual_indexes in config.json are {taken_after}; they should ascend and be among "
            f"the tower's {vision.depth} blocks"
        )
    if len(taken_after) > config.text_config.num_hidden_layers:
        raise ResPruneError(
            f"the tower gives {len(taken_after)} planes and the language model has "
            f"{config.text_config.num_hidden_layers} layers; correct config.json"
        )
    model = weightless_model(checkpoint, Qwen3VLForConditionalGeneration, config, dtype, mode)
    rotary: Any = model.model.language_model.rotary_emb
    rotary.recomposition_frequencies = partial(recomposed, rotary.mrope_section)
    with config_faults(checkpoint):
        component = _vision_component(model, config, table_side(checkpoint.config), dtype)
    planes = tuple(layer + 1 for layer in taken_after)
    tower = replace(
        tower_facts(vision, processor.max_tokens),
        planes=planes,
        projectors=lambda model: [model.model.visual.merger, *model.model.visual.deepstack_merger_list],
    )
    component = replace(component, tower=tower)
    return assemble(
        checkpoint,
        model,
        component,
        dtype,
        plane_layers=tuple(range(len(taken_after))),
        reference=_decode,
        max_tokens=processor.max_tokens,
        places=lambda inputs: places_of(grid_of(inputs, vision.spatial_merge_size)),
    )


def recomposed(sections: list[int], values: Tensor) -> Tensor:
    """`recomposition_frequencies` of the model's rotary embedding: values [3, B, S, W / 2] of t, h and w → [B, S, W].

    Theirs writes h and w into t, for which torch.onnx would trace the whole decoder a second time.
    """
    axes = torch.from_numpy(interleaved(sections, values.shape[-1]))
    mixed = values[0]
    for axis in (1, 2):
        mixed = torch.where(axes == axis, values[axis], mixed)
    return torch.cat((mixed, mixed), dim=-1)


def _vision_component(model: Any, config: Any, side: int, dtype: torch.dtype) -> Component:
    vision = config.vision_config
    merge = vision.spatial_merge_size
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    inputs = (
        TensorSpec("pixel_values", "float32", ("num_patches", pixels)),
        TensorSpec("patch_positions", "int64", ("num_patches", 2)),
        TensorSpec("position_taps", "int64", ("num_patches", 4)),
        TensorSpec("position_weights", "float32", ("num_patches", 4)),
    )
    names = ["image_features", *map(PLANE_FEATURES.format, range(len(vision.deepstack_visual_indexes)))]
    shape = (1, "num_tokens", config.text_config.hidden_size)
    outputs = tuple(TensorSpec(name, "float32", shape) for name in names)

    def samples(sizes: Sizes, generator: torch.Generator) -> tuple[Tensor, ...]:
        grid = Grid(merge * (2 + sizes["batch_size"]), merge * 5, merge)
        arrays: list[Any] = [patch_positions(grid), *position_taps(grid, side)]
        patches = torch.randn(grid.rows * grid.columns, pixels, generator=generator)
        return (patches, *(torch.from_numpy(array.copy()) for array in arrays))

    module = _Vision(model.model.visual, dtype)
    return Component("vision_encoder", module, inputs, outputs, samples, _features, module.blocks)


def _features(model: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """By the model's own code, its interpolation included."""
    grid = grid_of(inputs, model.config.vision_config.spatial_merge_size)
    features = model.get_image_features(inputs[0], torch.tensor([grid.thw]))
    return (
        torch.stack(list(features.pooler_output)),
        *(torch.cat(list(plane))[None] for plane in features.deepstack_features),
    )


def _decode(model: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What the decoder graph computes, by the model's own code: planes added to every row, 0 where there is text."""
    first_past = 3 + len(model.config.vision_config.deepstack_visual_indexes)
    planes, past = inputs[3:first_past], inputs[first_past:]
    return called(
        model,
        inputs,
        read_past(past),
        visual_pos_masks=torch.ones(inputs[0].shape[:2], dtype=torch.bool),
        deepstack_visual_embeds=[plane.flatten(0, 1) for plane in planes],
    )
