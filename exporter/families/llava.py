"""LLaVA-1.5 and its kin: one tower, one two-layer projector, a fixed number of visual tokens for each image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlavaConfig, LlavaForConditionalGeneration

from resprune.exporter.checkpoint.checkpoint import Checkpoint
from resprune.exporter.checkpoint.side_files import image_processor_config
from resprune.exporter.components import Component, Components, Sizes, Tower
from resprune.exporter.split import assemble, read_config, weightless_model
from resprune.names import IMAGE_FEATURES, VISION_ENCODER
from resprune.runtime.bundle.manifest import TensorSpec
from resprune.runtime.errors import ResPruneError, one_line
from resprune.runtime.families.image import ImageProcessor

TOWERS = {"clip_vision_model": 1, "siglip_vision_model": 0, "dinov2": 1}
"""The vision towers that there are, and the rows that each has before those of the patches: a class token."""


class Vision(nn.Module):
    """pixel_values [B, 3, H, W] → image_features [B, N, D], the rows that are spliced into the prompt.

    The same as `get_image_features` of transformers, which cannot be traced for a dynamic batch: it splits the batch
    into a Python list.
    """

    def __init__(self, tower: nn.Module, projector: nn.Module, layers: int | list[int], crop: bool) -> None:
        super().__init__()
        self.tower = tower
        self.projector = projector
        self.layers = [layers] if isinstance(layers, int) else list(layers)
        self.crop = crop

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The tower's layers, which DINOv2 calls by another name than the others."""
        encoder: Any = self.tower.encoder
        return tuple(encoder.layer if hasattr(encoder, "layer") else encoder.layers)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor]:
        hidden_states = self.tower(pixel_values, output_hidden_states=True).hidden_states
        chosen = [hidden_states[layer] for layer in self.layers]
        if self.crop:
            chosen = [hidden[:, 1:] for hidden in chosen]  # without the class token
        return (self.projector(torch.cat(chosen, dim=-1)),)


def split_model(checkpoint: Checkpoint, dtype: torch.dtype, mode: FakeTensorMode) -> Components:
    """The three components of a LLaVA checkpoint, weightless; `ResPruneError` for a config that they cannot carry."""
    config = read_config(checkpoint, LlavaConfig)
    check_tower(config.vision_config)
    model = weightless_model(checkpoint, LlavaForConditionalGeneration, config, dtype, mode)
    module = Vision(
        model.model.vision_tower,
        model.model.multi_modal_projector,
        config.vision_feature_layer,
        config.vision_feature_select_strategy == "default",
    )
    vision = grid_component(module, module.blocks, pixel_size(checkpoint), mode)
    num_tokens = int(vision.outputs[0].shape[1])
    vision = replace(vision, tower=tower_facts(module, config.vision_config, num_tokens))
    return assemble(checkpoint, model, vision, dtype, num_tokens=num_tokens)


def tower_output(tower: nn.Module, size: tuple[int, int], mode: FakeTensorMode) -> tuple[int, int]:
    """N and D of what a weightless tower and its projector make of images of `size`, height and width.

    Raises `ResPruneError` where the tower refuses that size, or lacks a layer that the config names.
    """
    try:
        with mode:
            _, num_tokens, hidden_size = tower(torch.empty(1, 3, *size))[0].shape
    except (ValueError, IndexError, RuntimeError) as error:
        raise ResPruneError(
            f"the checkpoint's config does not fit its vision tower, which gets {size[0]} x {size[1]} pixels: "
            f"{one_line(error)}"
        ) from None
    return num_tokens, hidden_size


def check_tower(config: Any) -> None:
    """`ResPruneError` unless the vision tower is of a kind whose rows `Vision` can take."""
    if config.model_type not in TOWERS:
        raise ResPruneError(
            f"the vision tower is of type {config.model_type}; supported are {', '.join(TOWERS)}"
        )


def pixel_size(checkpoint: Checkpoint) -> tuple[int, int]:
    """Height and width of the images that the runtime makes by the checkpoint's image processor."""
    processor = ImageProcessor.from_config(image_processor_config(checkpoint))
    pixels = processor(Image.new("RGB", (32, 32)))
    return pixels.shape[1], pixels.shape[2]


def grid_component(
    module: nn.Module, blocks: Sequence[nn.Module], size: tuple[int, int], mode: FakeTensorMode
) -> Component:
    """The vision component of images of one `size`, height and width: `pixel_values` [B, 3, H, W] and nothing else.

    `blocks` are the repeated layers of `module`. `ResPruneError` where the tower does not take that size.
    """

    def samples(sizes: Sizes, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (torch.randn((sizes["batch_size"], 3, *size), generator=generator),)

    num_tokens, hidden_size = tower_output(module, size, mode)
    pixels = TensorSpec("pixel_values", "float32", ("batch_size", 3, *size))
    features = TensorSpec(IMAGE_FEATURES, "float32", ("batch_size", num_tokens, hidden_size))
    return Component(VISION_ENCODER, module, (pixels,), (features,), samples, _reference, tuple(blocks))


def tower_facts(module: Vision, config: Any, num_rows: int) -> Tower:
    """What a selection inside the tower of a LLaVA or its kin must know; `num_rows` go to the projector."""
    blocks, leading = len(module.blocks), TOWERS[config.model_type]
    tokens = num_rows if module.crop else num_rows - leading
    return Tower(
        tokens=tokens,
        hidden_size=config.hidden_size,
        layers=tuple(layer % (blocks + 1) for layer in module.layers),
        tower=lambda model: model.model.vision_tower,
        projectors=lambda model: [model.model.multi_modal_projector],
        places=lambda model, inputs: torch.arange(tokens)[:, None],
        leading=leading,
    )


def _reference(model: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (torch.stack(list(model.get_image_features(inputs[0]).pooler_output)),)
