"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL as Hugging Face runs them, whole and with pruned rows spliced in."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from resprune.exporter.components import Tower
from resprune.exporter.verify.early import selected_early
from resprune.exporter.verify.reference import residual_select, text_gain
from resprune.runtime.bundle.manifest import Early
from resprune.runtime.families.table import FAMILIES
from tests.exporter.hugging_face import STEPS, Expected, ImageArray, counted, tower_of, weighed

MODELS = {
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen2_vl": Qwen2VLForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
}


class HuggingFaceQwen:
    """A checkpoint as transformers loads and runs it, in float32."""

    def __init__(self, root: Path) -> None:
        kind = json.loads((root / "config.json").read_text())["model_type"]
        self.model: Any = MODELS[kind].from_pretrained(root, dtype=torch.float32).eval()
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(root)
        self.root = root

    @cached_property
    def tower(self) -> Tower:
        """What the exporter knows of the vision tower."""
        return tower_of(self.root)

    @torch.no_grad()
    def pruned(
        self,
        pictures: list[ImageArray],
        prompt_ids: list[int],
        text_token_ids: list[int],
        *,
        budgets: list[int],
        steps: int,
        proportional: bool = False,
        with_planes: bool = True,
        early: Early | None = None,
    ) -> Expected:
        """Greedy generation from a prompt with one image token a picture, of which `budgets` tokens each are kept.

        The whole prompt is built first, with the positions that the model itself gives it; then rows are left out.
        `early` is a first selection inside the vision tower.
        """
        encoded = [self._encoded(picture, early) for picture in pictures]
        features, (_, grids) = [planes[0] for planes, _ in encoded], self._pixels(pictures)
        ids, kinds = self._whole(prompt_ids, [len(rows) for rows in features])
        positions, _ = self.model.model.get_rope_index(ids, kinds, image_grid_thw=grids)  # [3, 1, S]
        table = self.model.get_input_embeddings()
        embeds = table(ids).clone()
        embeds[kinds == 1] = torch.cat(features)
        text = table(torch.tensor([text_token_ids], dtype=torch.long))
        stays = kinds[0] == 0
        places = torch.nonzero(kinds[0] == 1)[:, 0].split([len(rows) for rows in features])
        picks, counts = [], []
        weights = torch.ones_like(ids[0])
        for rows, budget, place, (_, left) in zip(features, budgets, places, encoded, strict=True):
            alpha = FAMILIES[self.model.config.model_type].defaults.alpha
            gain = text_gain(rows[None], text, None, left, alpha=alpha)
            order = residual_select(rows[None], gain, min(budget, int(left.sum())), left)[0]
            stays[place[order]] = True
            picks.append(order.tolist())
            counts.append(counted(rows, sorted(picks[-1]), proportional, left))
            weights[place[order.sort().values]] = torch.tensor(counts[-1])
        further = zip(*(planes[1:] for planes, _ in encoded), strict=True)
        planes = [torch.cat(plane) for plane in further] if with_planes else []
        with weighed(weights[stays].tolist()):
            if planes:
                rows = stays[kinds[0] == 1]
                kept = [plane[rows] for plane in planes]
                token_ids = self._generate_deep(
                    embeds[:, stays], positions[:, :, stays], kinds[:, stays] == 1, kept, steps
                )
            else:
                token_ids = self._generate(embeds[:, stays], positions[:, :, stays], steps)
        candidates = [left[0].nonzero()[:, 0].tolist() for _, left in encoded]
        return Expected(token_ids, picks, counts, [] if early is None else candidates)

    @torch.no_grad()
    def unpruned(self, pictures: list[ImageArray], prompt_ids: list[int], *, steps: int) -> list[int]:
        """Plain `generate` from ids and pixels, every visual token kept."""
        pixels, grids = self._pixels(pictures)
        ids, kinds = self._whole(prompt_ids, (grids.prod(dim=1) // 4).tolist())
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=kinds,
            pixel_values=pixels,
            image_grid_thw=grids,
            **_greedy(steps),
        )
        generated: list[int] = out[0, ids.shape[1] :].tolist()
        return generated

    @torch.no_grad()
    def features(self, pictures: list[ImageArray]) -> list[Tensor]:
        """All tokens [N, D] of each picture."""
        return list(self.model.get_image_features(*self._pixels(pictures)).pooler_output)

    def num_tokens(self, pictures: list[ImageArray]) -> list[int]:
        """N of each picture."""
        return [int(count) for count in self._pixels(pictures)[1].prod(dim=1) // 4]

    def _pixels(self, pictures: list[ImageArray]) -> tuple[Tensor, Tensor]:
        batch = self.processor(images=pictures, return_tensors="pt")
        return batch["pixel_values"], batch["image_grid_thw"]

    def _whole(self, prompt_ids: list[int], counts: list[int]) -> tuple[Tensor, Tensor]:
        """Ids [1, S] with an image token for each visual token, and where those are (1)."""
        image, left = self.model.config.image_token_id, iter(counts)
        ids = [token for id_ in prompt_ids for token in ([id_] * next(left) if id_ == image else [id_])]
        whole = torch.tensor([ids])
        return whole, (whole == image).long()

    def _encoded(self, picture: ImageArray, early: Early | None) -> tuple[list[Tensor], Tensor]:
        """All planes [N, D] of a picture, the main one first, and which tokens its tower left, [1, N]."""
        pixels, grid = self._pixels([picture])
        left = torch.ones(1, int(grid.prod()) // 4, dtype=torch.bool)
        if early is None:
            output = self.model.get_image_features(pixels, grid)
        else:
            last = grid[:, 1:] - 1  # the row and column of the last patch
            count = early.left(left.shape[1])
            with selected_early(self.model, self.tower, early.layer, count, (pixels, last)) as kept:
                output = self.model.get_image_features(pixels, grid)
            left = torch.zeros_like(left).scatter(1, kept[0], True)
        # Only Qwen3-VL has DeepStack's, each in a list of the pictures'.
        further = getattr(output, "deepstack_features", None) or []
        return [*output.pooler_output, *(torch.cat(list(plane)) for plane in further)], left

    def _generate_deep(
        self, embeds: Tensor, positions: Tensor, visual: Tensor, planes: list[Tensor], steps: int
    ) -> list[int]:
        """Greedy by the language model itself: `generate` takes no features of images that it has not encoded."""
        cache, tokens = DynamicCache(), []
        language_model = self.model.model.language_model
        given: dict[str, Any] = {"visual_pos_masks": visual, "deepstack_visual_embeds": planes}
        while len(tokens) < steps:
            hidden = language_model(
                inputs_embeds=embeds, position_ids=positions, past_key_values=cache, use_cache=True, **given
            ).last_hidden_state
            tokens.append(int(self.model.lm_head(hidden[0, -1]).argmax()))
            embeds = self.model.get_input_embeddings()(torch.tensor([tokens[-1:]]))
            positions, given = positions[..., -1:] + 1, {}
        return tokens

    def _generate(self, embeds: Tensor, positions: Tensor, steps: int) -> list[int]:
        # The first of four axes is for the mask and counts what is there.
        counted = torch.arange(embeds.shape[1])[None, None]
        ids = self.model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(1, embeds.shape[1], dtype=torch.int64),
            position_ids=torch.cat([counted, positions]),
            **_greedy(steps),
        )
        generated: list[int] = ids[0].tolist()
        return generated


def _greedy(steps: int) -> dict[str, Any]:
    return {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False}


def picture(height: int, width: int, seed: int = 0) -> ImageArray:
    blocks = np.random.default_rng([seed, height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.repeat(np.repeat(blocks, 10, axis=0), 10, axis=1)


def check(
    answer: Any, model: HuggingFaceQwen, pictures: list[ImageArray], budgets: list[int], **how: bool
) -> None:
    """Picks of every picture, what they count for, and the greedy tokens."""
    expected = model.pruned(
        pictures, answer.prompt.ids, answer.prompt.text_token_ids, budgets=budgets, steps=STEPS, **how
    )
    assert [picks.kept_counts.tolist() for picks in answer.images] == expected.kept_counts
    assert [picks.pick_order.tolist() for picks in answer.images] == expected.pick_orders
    assert answer.token_ids == expected.token_ids
    assert len(set(answer.token_ids)) > 5, "a model that repeats itself shows nothing"
