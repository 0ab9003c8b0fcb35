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
from resprune.exporter.components import Component, Components
from resprune.exporter.families.qwen2_vl import (
    Block,
    check_processor,
    grid_of,
    patches_component,
    placed,
    tower_facts,
)
from resprune.exporter.language import Rows, called, read_past
from resprune.exporter.split import assemble, read_config, weightless_model
from resprune.runtime.bundle.manifest import TensorSpec
from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.qwen2_vl import DynamicResolution
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
        component = _vision_component(model, table_side(checkpoint.config), dtype)
    planes, plane_layers = tuple(layer + 1 for layer in taken_after), tuple(range(len(taken_after)))
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
        plane_layers=plane_layers,
        reference=partial(_decode, Rows(plane_layers)),
        max_tokens=processor.max_tokens,
        images=lambda inputs: [placed(grid_of(inputs, vision.spatial_merge_size))],
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


def _vision_component(model: Any, side: int, dtype: torch.dtype) -> Component:
    taps = (
        TensorSpec("position_taps", "int64", ("num_patches", 4)),
        TensorSpec("position_weights", "float32", ("num_patches", 4)),
    )
    module = _Vision(model.model.visual, dtype)
    planes = len(module.taken_after)
    return patches_component(model, module, 2, taps, lambda grid: position_taps(grid, side), planes)


def _decode(rows: Rows, model: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What the decoder graph computes, by the model's own code: planes added to every row, 0 where there is text."""
    planes, _, past = rows.parts(inputs[3:])
    return called(
        model,
        inputs,
        read_past(past),
        visual_pos_masks=torch.ones(inputs[0].shape[:2], dtype=torch.bool),
        deepstack_visual_embeds=[plane.flatten(0, 1) for plane in planes],
    )
