"""What a bundle must reproduce: Hugging Face `generate`, with the reference's pruned rows spliced into the prompt."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageTextToText
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from resprune.exporter.checkpoint.checkpoint import resolve
from resprune.exporter.checkpoint.weightless import fake_mode
from resprune.exporter.components import Tower
from resprune.exporter.families import split_model
from resprune.exporter.verify.early import selected_early
from resprune.exporter.verify.reference import kept_counts, residual_select, text_gain
from resprune.runtime.bundle.files import read_bundle, write_manifest
from resprune.runtime.bundle.manifest import Early

ImageArray = NDArray[np.uint8]
STEPS = 40


@dataclass
class Expected:
    """One answer: the generated ids, each picture's picks in order, and what each kept token counts for, ascending.

    `candidates` are what a selection inside the vision tower left of each picture.
    """

    token_ids: list[int]
    pick_orders: list[list[int]]
    kept_counts: list[list[int]]
    candidates: list[list[int]] = field(default_factory=list)


class HuggingFace:
    """A checkpoint as transformers loads and runs it, in float32."""

    def __init__(self, root: Path) -> None:
        self.model: Any = AutoModelForImageTextToText.from_pretrained(root, dtype=torch.float32).eval()
        self.processor = AutoImageProcessor.from_pretrained(root, backend="pil")
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
        k: int,
        positions: str,
        steps: int,
        alpha: float = 1.0,
        scale: str = "minmax",
        may_end: bool = False,
        proportional: bool = False,
        early: Early | None = None,
    ) -> Expected:
        """Greedy generation from a prompt with one image token for each span of each picture, of `steps` tokens.

        `may_end` lets it end before, as the trained model does; `proportional` is proportional attention;
        `early` is a first selection inside the vision tower.
        """
        left: list[Tensor | None] = [None] * len(pictures)
        if early is None:
            features = self._features(pictures)  # each [N, D]
        else:
            with selected_early(self.model, self.tower, early.layer, early.tokens):
                features = self._features(pictures)
            # Where a picture is packed, newlines stand between the tokens that are left.
            left = [of_one.abs().sum(dim=1)[None] > 0 for of_one in features]
        table = self.model.get_input_embeddings()
        text = table(torch.tensor([text_token_ids]))
        picks = [
            residual_select(
                of_one[None], text_gain(of_one[None], text, None, mask, alpha=alpha, scale=scale), k, mask
            )[0].tolist()
            for of_one, mask in zip(features, left, strict=True)
        ]
        kept = [sorted(index for index in order if index >= 0) for order in picks]
        counts = [
            counted(of_one, indices, proportional, mask)
            for of_one, indices, mask in zip(features, kept, left, strict=True)
        ]
        rows: list[Tensor] = []
        places: list[int] = []
        weights: list[int] = []
        of_image: list[bool] = []
        place = 0
        spans = [
            (of_one, one, start, start + length)
            for of_one, one in enumerate(features)
            for start, length in self._spans(one)
        ]
        for token in prompt_ids:
            if token == self.model.config.image_token_id:
                picture, one, start, end = spans.pop(0)
                inside = [index for index in kept[picture] if start <= index < end]
                rows += one[inside]
                places += [place + index - start for index in inside]
                weights += [
                    count
                    for index, count in zip(kept[picture], counts[picture], strict=True)
                    if index in inside
                ]
                of_image += [True] * len(inside)
                place += end - start
            else:
                rows.append(table(torch.tensor(token)))
                places.append(place)
                weights.append(1)
                of_image.append(False)
                place += 1
        position_ids = torch.arange(len(rows)) if positions == "contiguous" else torch.tensor(places)
        with weighed(weights):
            ids = self.model.generate(
                inputs_embeds=torch.stack(rows)[None],
                attention_mask=torch.ones(1, len(rows), dtype=torch.int64),
                position_ids=position_ids[None],
                **self._told(of_image),
                **_greedy(steps, may_end=may_end),
            )
        orders = [[index for index in order if index >= 0] for order in picks]
        candidates = [[] if mask is None else mask[0].nonzero()[:, 0].tolist() for mask in left]
        return Expected(ids[0].tolist(), orders, counts, candidates)

    @torch.no_grad()
    def unpruned(self, pictures: list[ImageArray], prompt_ids: list[int], *, steps: int) -> list[int]:
        """Plain `generate` from ids and pixels, every visual token kept."""
        counts = iter([length for of_one in self._features(pictures) for _, length in self._spans(of_one)])
        image = self.model.config.image_token_id
        ids = [token for id_ in prompt_ids for token in ([id_] * next(counts) if id_ == image else [id_])]
        out = self.model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            **self._inputs(pictures),
            **self._told([token == image for token in ids]),
            **_greedy(steps),
        )
        generated: list[int] = out[0, len(ids) :].tolist()
        return generated

    def _spans(self, features: Tensor) -> list[tuple[int, int]]:
        """Where each span of a picture with these rows [N, D] begins among them, and its length: one of all."""
        return [(0, len(features))]

    def _inputs(self, pictures: list[ImageArray]) -> dict[str, Tensor]:
        """`pixel_values`, and whatever else the family's model takes of its pictures."""
        return dict(self.processor(images=pictures, return_tensors="pt"))

    def _told(self, of_image: list[bool]) -> dict[str, Tensor]:
        """What more `generate` takes of a prompt, of which the model is told which rows are an image's."""
        return {}

    def _features(self, pictures: list[ImageArray]) -> list[Tensor]:
        """All rows [N, D] of each picture."""
        return list(self.model.get_image_features(**self._inputs(pictures)).pooler_output)


class HuggingFaceTiles(HuggingFace):
    """InternVL, whose rows of a picture stand side by side, and SmolVLM and Idefics3, whose tiles have text between."""

    def _inputs(self, pictures: list[ImageArray]) -> dict[str, Tensor]:
        """Their processors have the pictures of a prompt in a list of its own."""
        nested = pictures if self._side_by_side else [pictures]
        inputs = dict(self.processor(images=nested, return_tensors="pt"))
        return {name: value for name, value in inputs.items() if name.startswith("pixel")}

    @property
    def _side_by_side(self) -> bool:
        return self.model.config.model_type == "internvl"

    def _features(self, pictures: list[ImageArray]) -> list[Tensor]:
        features = []
        for picture in pictures:
            rows = self.model.get_image_features(**self._inputs([picture])).pooler_output
            features.append(rows.flatten(0, 1) if self._side_by_side else rows[0])
        return features

    def _spans(self, features: Tensor) -> list[tuple[int, int]]:
        if self._side_by_side:
            return super()._spans(features)
        of_one = self.model.model.image_seq_len
        return [(start, of_one) for start in range(0, len(features), of_one)]


class HuggingFaceTwoWay(HuggingFace):
    """Gemma 3, where the rows of an image see each other in both directions."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        prepare = self.model.prepare_inputs_for_generation

        def named(input_ids: Any, inputs_embeds: Any = None, **kwargs: Any) -> Any:
            """The same: `generate` gives embeddings only to a function that names them."""
            return prepare(input_ids, inputs_embeds=inputs_embeds, **kwargs)

        self.model.prepare_inputs_for_generation = named

    def _told(self, of_image: list[bool]) -> dict[str, Tensor]:
        return {"token_type_ids": torch.tensor([of_image]).long()}

    def _inputs(self, pictures: list[ImageArray]) -> dict[str, Tensor]:
        return {"pixel_values": super()._inputs(pictures)["pixel_values"]}


def tower_of(root: Path) -> Tower:
    """What the exporter knows of a checkpoint's vision tower."""
    tower = split_model(resolve(str(root)), torch.float32, fake_mode()).vision.tower
    assert tower is not None
    return tower


def counted(features: Tensor, kept: list[int], proportional: bool, left: Tensor | None = None) -> list[int]:
    """What each of the `kept` tokens of one picture [N, D] counts for, of those in `left` [1, N] or of all."""
    if not proportional:
        return [1] * len(kept)
    counts: list[int] = kept_counts(features[None], torch.tensor([kept]), left)[0].tolist()
    return counts


@contextmanager
def weighed(counts: Sequence[int]) -> Iterator[None]:
    """Proportional attention in transformers' own: the logarithms of the prompt's `counts` are added to the scores."""
    bias, length = torch.tensor(counts).log(), 0

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        nonlocal length
        length += query.shape[2] * (module.layer_idx == 0)
        whole = torch.nn.functional.pad(bias, (0, length - len(bias)))
        # A cache for sliding windows has the last keys only.
        options["position_bias"] = whole[-key.shape[2] :].expand(1, 1, 1, -1)
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    if max(counts) > 1:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    try:
        yield
    finally:
        if max(counts) > 1:
            del ALL_ATTENTION_FUNCTIONS["sdpa"]


def _greedy(steps: int, *, may_end: bool = False) -> dict[str, Any]:
    return {"max_new_tokens": steps, "min_new_tokens": 1 if may_end else steps, "do_sample": False}


def check(
    model: HuggingFace, answer: Any, images: list[Any], k: int, positions: str = "contiguous", **how: Any
) -> None:
    """An answer of STEPS tokens about `images` has the picks, counts and tokens of the model pruned in PyTorch."""
    ids, text = answer.prompt.ids, answer.prompt.text_token_ids
    expected = model.pruned(images, ids, text, k=k, positions=positions, steps=STEPS, **how)
    assert [picks.pick_order.tolist() for picks in answer.images] == expected.pick_orders
    assert [picks.kept_counts.tolist() for picks in answer.images] == expected.kept_counts
    assert answer.token_ids == expected.token_ids
    assert len(answer.token_ids) == STEPS


def with_positions(bundle: Path, copy: Path, positions: str) -> Path:
    """The same bundle under the other position policy, which only the manifest records."""
    shutil.copytree(bundle, copy)
    write_manifest(copy, dataclasses.replace(read_bundle(copy).manifest, positions=positions))
    return copy


def picture(seed: int, height: int = 50, width: int = 70) -> ImageArray:
    """Blocks of colour, so that neighbouring patches differ and none is flat grey."""
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.repeat(np.repeat(blocks, height // 5, axis=0), width // 7, axis=1)


def changed(checkpoint: Path, copy: Path, **files: dict[str, Any]) -> str:
    """A copy of a checkpoint with other values at dotted keys of its JSON files; keywords name these."""
    shutil.copytree(checkpoint, copy)
    for name, change in files.items():
        path = copy / f"{name}.json"
        content = json.loads(path.read_text())
        for key, value in change.items():
            part = content
            *parents, last = key.split(".")
            for parent in parents:
                part = part[parent]
            part[last] = value
        path.write_text(json.dumps(content))
    return str(copy)
