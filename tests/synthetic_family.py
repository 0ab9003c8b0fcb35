"""A family that exists in the tests alone: everything that the contract knows, in the smallest model that has it.

A tower and a projector as LLaVA's, two planes that are added after the language model's layers 0 and 1, an image that
lies in three spans of the prompt, protected rows: the first and the last of each span, and rows that are attached to
others, before them and behind, in their span and in another.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.cache_utils import DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from resprune.exporter.checkpoint.checkpoint import Checkpoint
from resprune.exporter.components import Component, Components, Sizes
from resprune.exporter.split import assemble, read_config, weightless_model
from resprune.exporter.verify.reference import keep, kept_counts, select
from resprune.method import Selection
from resprune.runtime.bundle.files import Bundle
from resprune.runtime.bundle.manifest import Range, TensorSpec
from resprune.runtime.families.fixed_grid import FixedGrid
from resprune.runtime.families.image import Box
from resprune.runtime.families.preprocessor import Arrays, PreparedImage
from resprune.runtime.families.table import FAMILIES, Family
from tests import tiny

NAME = "synthetic"
SPANS = (6, 5, 5)
EXPANSION = f"{tiny.IMAGE_TOKEN} left{tiny.IMAGE_TOKEN} and right{tiny.IMAGE_TOKEN}"
NUM_TOKENS = sum(SPANS)
ATTACHED_TO = [{2: 1, 4: 5, 8: 13, 9: 13}.get(row, -1) for row in range(NUM_TOKENS)]
PLANE_LAYERS = (0, 1)
SHAPE = tiny.Tiny(hidden=64, heads=4, kv_heads=2, layers=4, image_size=36, patch_size=9, seed=7)
VARIANTS = {NAME: SHAPE}


class SyntheticConfig(LlavaConfig):
    """LLaVA's, under a name of its own."""

    model_type = NAME


class SyntheticModel(LlavaForConditionalGeneration):
    """LLaVA with planes; each is a projection of what the tower has after one of its layers."""

    config_class = SyntheticConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        sizes = config.vision_config.hidden_size, config.text_config.hidden_size
        self.model.plane_projectors = nn.ModuleList(nn.Linear(*sizes) for _ in PLANE_LAYERS)


def protected_rows() -> list[bool]:
    """Which of an image's tokens are protected."""
    return [place in (0, length - 1) for length in SPANS for place in range(length)]


class _Vision(nn.Module):
    """pixel_values [B, 3, H, W] → image_features and two planes, [B, N, D] each."""

    def __init__(self, model: Any, layer: int) -> None:
        super().__init__()
        self.tower, self.projector = model.vision_tower, model.multi_modal_projector
        self.planes, self.layer = model.plane_projectors, layer

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        hidden = [state[:, 1:] for state in self.tower(pixel_values, output_hidden_states=True).hidden_states]
        planes = (project(state) for project, state in zip(self.planes, hidden[1:], strict=False))
        return self.projector(hidden[self.layer]), *planes


def split_model(checkpoint: Checkpoint, dtype: torch.dtype, mode: FakeTensorMode) -> Components:
    """The components of a synthetic checkpoint."""
    config = read_config(checkpoint, SyntheticConfig)
    model = weightless_model(checkpoint, SyntheticModel, config, dtype, mode)
    return assemble(
        checkpoint,
        model,
        _vision_component(model, config),
        dtype,
        plane_layers=PLANE_LAYERS,
        reference=decode_by_hand,
        images=lambda inputs: [in_spans({})] * len(inputs[0]),
        protected=lambda inputs: torch.tensor(protected_rows()).expand(len(inputs[0]), -1),
        attached_to=lambda inputs: torch.tensor(ATTACHED_TO).expand(len(inputs[0]), -1),
        num_tokens=NUM_TOKENS,
    )


def _vision_component(model: Any, config: Any) -> Component:
    side = config.vision_config.image_size
    shape = ("batch_size", NUM_TOKENS, config.text_config.hidden_size)
    names = ["image_features", *(f"plane_features.{index}" for index in range(len(PLANE_LAYERS)))]

    def samples(sizes: Sizes, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (torch.randn((sizes["batch_size"], 3, side, side), generator=generator),)

    return Component(
        "vision_encoder",
        _Vision(model.model, config.vision_feature_layer),
        (TensorSpec("pixel_values", "float32", ("batch_size", 3, side, side)),),
        tuple(TensorSpec(name, "float32", shape) for name in names),
        samples,
        _reference,
        tuple(model.model.vision_tower.encoder.layers),
    )


def _reference(model: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    features = torch.stack(list(model.get_image_features(inputs[0]).pooler_output))
    embeddings = model.model.vision_tower.embeddings(inputs[0])
    hidden, planes = model.model.vision_tower.pre_layrnorm(embeddings), []
    for layer, project in zip(
        model.model.vision_tower.encoder.layers, model.model.plane_projectors, strict=False
    ):
        hidden = layer(hidden, None)
        planes.append(project(hidden[:, 1:]))
    return features, *planes


def decode_by_hand(model: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The decoder layer by layer, with each plane added after its own: nothing of the exporter's takes part."""
    hidden, mask, positions, first, second, *past = inputs
    language_model = model.model.language_model
    cache = DynamicCache()
    for layer in range(len(past) // 2):
        cache.update(past[2 * layer].float(), past[2 * layer + 1].float(), layer)
    length = past[0].shape[2]
    causal = torch.arange(mask.shape[1])[None, :] <= torch.arange(hidden.shape[1])[:, None] + length
    seen = causal[None, None] & mask.bool()[:, None, None, :]
    counts = mask.clamp(min=1).float().log()[:, None, None, :]
    additive = torch.where(seen, counts, torch.finfo(torch.float32).min)
    rotary = language_model.rotary_emb(hidden, positions)
    for index, layer in enumerate(language_model.layers):
        hidden = layer(
            hidden,
            attention_mask=additive,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            position_embeddings=rotary,
        )
        if index in PLANE_LAYERS:
            hidden = hidden + (first, second)[PLANE_LAYERS.index(index)]
    logits = model.lm_head(language_model.norm(hidden)[:, -1:])
    return (logits, *(kept for layer in cache.layers for kept in (layer.keys, layer.values)))


def write_checkpoint(root: Path, shape: tiny.Tiny) -> Path:
    """A checkpoint of the family, whose planes are as large as what they are added to."""
    with patch.dict(tiny.MODELS, {"llava": (SyntheticConfig, SyntheticModel)}):
        tiny.write_checkpoint(root, shape)
    config = json.loads((root / "config.json").read_text())
    assert config["model_type"] == NAME
    return root


def in_spans(arrays: Arrays) -> PreparedImage:
    """An image of these arrays, with words between its three spans."""
    offsets = np.concatenate([np.arange(length) for length in SPANS])
    rules = np.array(protected_rows()), np.array(ATTACHED_TO)
    return PreparedImage(arrays, offsets, SPANS, SPANS, EXPANSION, *rules)


@dataclass(frozen=True)
class InSpans:
    """`FixedGrid`, whose tokens lie in three spans of the prompt with words between them."""

    grid: FixedGrid
    max_batch: int | None = None

    @staticmethod
    def from_bundle(bundle: Bundle) -> InSpans:
        """From the bundle's image processor."""
        return InSpans(FixedGrid.from_bundle(bundle, SHAPE.patch_size))

    def __call__(self, image: Image.Image) -> PreparedImage:
        """As `FixedGrid`."""
        return in_spans(self.grid(image).arrays)

    def batch(self, images: Sequence[PreparedImage]) -> Arrays:
        """As `FixedGrid`."""
        return self.grid.batch(images)

    def axes(self, batch: Range, tokens: Range) -> dict[str, Range]:
        """As `FixedGrid`."""
        return self.grid.axes(batch, tokens)

    def boxes(self, image_size: tuple[int, int]) -> list[Box | None]:
        """As `FixedGrid`."""
        return self.grid.boxes(image_size)


FAMILY = Family(NAME, "the synthetic family", NAME, plain_prompt=True)


@contextmanager
def registered() -> Iterator[Family]:
    """While it lasts, the family is one of the table's and of transformers', and both rooms find its module."""
    modules = {f"resprune.{room}.families.{NAME}": ModuleType(NAME) for room in ("exporter", "runtime")}
    for module in modules.values():
        vars(module).update(split_model=split_model, preprocessor=InSpans.from_bundle)
    with (
        patch.dict(FAMILIES, {NAME: FAMILY}),
        patch.dict(CONFIG_MAPPING._extra_content, {NAME: SyntheticConfig}),
        patch.dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING._extra_content, {SyntheticConfig: SyntheticModel}),
    ):
        sys.modules.update(modules)
        try:
            yield FAMILY
        finally:  # these alone: what was imported meanwhile stays, or it would be there twice
            for name in modules:
                del sys.modules[name]


class Oracle:
    """The checkpoint in PyTorch, which answers from pruned prompts without anything of the exporter or the runtime."""

    def __init__(self, root: Path) -> None:
        loaded: Any = SyntheticModel.from_pretrained(root)
        self.model = loaded.eval()

    @torch.no_grad()
    def answer(
        self,
        pixels: Sequence[Any],
        ids: Sequence[int],
        nouns: Sequence[int],
        k: int,
        positions: str,
        steps: int,
        *,
        proportional: bool = False,
    ) -> tuple[list[list[int]], list[int]]:
        """Pick orders of the images `pixels` [3, H, W] each, and greedy tokens after the prompt `ids`."""
        planes = _reference(self.model, (torch.tensor(np.stack(pixels)),))  # [images, N, D] each
        table = self.model.get_input_embeddings()
        rules = (torch.tensor(rule).expand(len(pixels), -1) for rule in (protected_rows(), ATTACHED_TO))
        text = table(torch.tensor(nouns, dtype=torch.int64)).expand(len(pixels), -1, -1)
        _, orders = select(planes[0], text, None, Selection(k=k), None, *rules)
        _, kept = keep(planes[0], orders)
        counts = kept_counts(planes[0], kept) if proportional else torch.ones_like(kept)

        image_token = tiny.SPECIAL.index(tiny.IMAGE_TOKEN)
        rows: list[tuple[Tensor, Tensor, Tensor]] = []
        mask: list[int] = []
        places: list[int] = []
        span = place = 0
        for token in ids:
            if token != image_token:
                zero = torch.zeros(planes[0].shape[2])
                rows.append((table.weight[token], zero, zero))
                mask.append(1)
                places.append(place)
                place += 1
                continue
            image, number = divmod(span, len(SPANS))
            first = sum(SPANS[:number])
            for index, count in zip(kept[image].tolist(), counts[image].tolist(), strict=True):
                if first <= index < first + SPANS[number]:
                    rows.append((planes[0][image, index], planes[1][image, index], planes[2][image, index]))
                    mask.append(count)
                    places.append(place + index - first)
            place += SPANS[number]
            span += 1
        tokens: list[int] = []
        past = torch.zeros(1, SHAPE.kv_heads, 0, SHAPE.hidden // SHAPE.heads)
        for _ in range(steps):
            where = range(len(rows)) if positions == "contiguous" else places
            hidden, *others = (torch.stack(plane)[None] for plane in zip(*rows, strict=True))
            inputs = (hidden, torch.tensor([mask]), torch.tensor([list(where)]), *others)
            logits, *_ = decode_by_hand(self.model, (*inputs, *[past] * (2 * SHAPE.layers)))
            tokens.append(int(logits[0, -1].argmax()))
            rows.append(
                (table.weight[tokens[-1]], torch.zeros_like(rows[0][0]), torch.zeros_like(rows[0][0]))
            )
            mask.append(1)
            places.append(place)
            place += 1
        return [[row for row in order if row >= 0] for order in orders.tolist()], tokens
