"""Gemma 3: a SigLIP tower whose patches are averaged, and a language model where an image's rows see each other."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Gemma3Config, Gemma3ForConditionalGeneration
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3TextScaledWordEmbedding,
    create_masks_for_vision_model,
)

from resprune.exporter.checkpoint.checkpoint import Checkpoint
from resprune.exporter.checkpoint.side_files import image_processor_config
from resprune.exporter.components import Components, Tower
from resprune.exporter.families.llava import grid_component, pixel_size
from resprune.exporter.families.merging import merge_order, of_tokens
from resprune.exporter.language import Rows, decode
from resprune.exporter.split import assemble, read_config, weightless_model
from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.gemma3 import check_processor

TOWER = "siglip_vision_model"


class _Vision(nn.Module):
    """pixel_values [B, 3, H, W] → image_features [B, N, D], which are not scaled as the text's embeddings are."""

    def __init__(self, tower: Any, projector: Any) -> None:
        super().__init__()
        self.tower = tower
        self.projector = projector
        self.side: int = projector.kernel_size

    def forward(self, pixel_values: Tensor) -> tuple[Tensor]:
        patches = merge_order(self.tower.embeddings(pixel_values), self.side)
        hidden = self.tower.post_layernorm(self.tower.encoder(inputs_embeds=patches).last_hidden_state)
        pooled = of_tokens(hidden, self.side).mean(2)
        return (self.projector.mm_soft_emb_norm(pooled) @ self.projector.mm_input_projection_weight,)


class _HalfScaledEmbedding(Gemma3TextScaledWordEmbedding):
    """A table in half, scaled after it: the scale is no number of half precision."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return nn.functional.embedding(input_ids, self.weight).float() * self.embed_scale


def split_model(checkpoint: Checkpoint, dtype: torch.dtype, mode: FakeTensorMode) -> Components:
    """The three components of a Gemma 3 checkpoint, weightless; `ResPruneError` for a config they cannot carry."""
    config = read_config(checkpoint, Gemma3Config)
    _check(config)
    check_processor(image_processor_config(checkpoint))
    halved = {Gemma3TextScaledWordEmbedding: _HalfScaledEmbedding}
    model = weightless_model(checkpoint, Gemma3ForConditionalGeneration, config, dtype, mode, halved)
    module = _Vision(model.model.vision_tower, model.model.multi_modal_projector)
    blocks = module.tower.encoder.layers
    vision = grid_component(module, blocks, pixel_size(checkpoint), mode)
    tower = Tower(
        tokens=int(vision.outputs[0].shape[1]),
        hidden_size=config.vision_config.hidden_size,
        layers=(len(blocks),),
        tower=lambda model: model.model.vision_tower,
        projectors=lambda model: [model.model.multi_modal_projector],
        group=module.side**2,
        places=_places,
    )
    vision = replace(vision, tower=tower)
    return assemble(
        checkpoint,
        model,
        vision,
        dtype,
        num_tokens=int(vision.outputs[0].shape[1]),
        two_way=True,
        reference=_decode,
    )


def _check(config: Any) -> None:
    if config.vision_config.model_type != TOWER:
        raise ResPruneError(
            f"the vision tower is of type {config.vision_config.model_type}; supported is {TOWER}"
        )
    if config.text_config.use_bidirectional_attention:
        raise ResPruneError(
            "use_bidirectional_attention in text_config lets every token see those after it, which is for embeddings "
            "and not for answers; take a checkpoint without it"
        )


def _decode(model: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return decode(model, inputs, Rows(two_way=True), partial(_masks, model.config.text_config))


def _masks(
    config: Any, embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, numbers: Tensor, cache: Any
) -> Any:
    """The masks of transformers for these rows: a block an image, −1 for text and for what is past."""
    past = torch.zeros_like(attention_mask)[:, : attention_mask.shape[1] - numbers.shape[1]]
    blocks = torch.cat([past, numbers], dim=1) - 1
    return create_masks_for_vision_model(config, embeds, attention_mask, cache, position_ids, blocks)


def _places(model: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    """Where the tower has the patches that are averaged to a token: [N, G]."""
    projector = model.model.multi_modal_projector
    side, pooled = projector.patches_per_image, projector.kernel_size
    patches = torch.arange(side**2).reshape(side, side)
    return patches.unfold(0, pooled, pooled).unfold(1, pooled, pooled).flatten(2).flatten(0, 1)
