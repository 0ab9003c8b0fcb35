"""A whole answer as the reference gives it: a prompt around the spans of a pruned image, and tokens after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resprune.exporter.components import Component
from resprune.runtime.families.preprocessor import PreparedImage


@dataclass(frozen=True)
class Where:
    """Which tokens of an image are kept, and where they stand."""

    picks: Tensor
    """[1, K], in the order of choice, -1 past the last."""
    counts: Tensor
    """[1, K]: how many tokens each kept one stands for, in the image's order."""
    image: PreparedImage
    """Where all the image's tokens stand in a prompt."""
    positions: str
    """The policy for position ids."""
    two_way: bool
    """Whether the rows of an image attend to each other in both directions."""


def splice(embeds: Tensor, planes: Sequence[Tensor], where: Where) -> tuple[Tensor, ...]:
    """The decoder's inputs up to the past, for a prompt [1, S', D] of as long pieces of text around the image's spans.

    They are the embeddings [1, S, D], the mask [1, S], the position ids [1, S] or [3, 1, S], and what more is said of
    each row. `planes` are [1, K, D] each, the main one first. The pieces are those of `tensor_split`.
    """
    image = where.image
    kept = where.picks[0][where.picks[0] >= 0].sort().values
    bounds = [0, *torch.searchsorted(kept, torch.tensor(image.spans).cumsum(0)).tolist()]
    spans = [slice(*ends) for ends in pairwise(bounds)]

    def around(text: Tensor, rows: Tensor) -> Tensor:
        first, *others = text.tensor_split(len(spans) + 1, dim=1)
        each = zip(spans, others, strict=True)
        return torch.cat([first, *(part for span, after in each for part in (rows[:, span], after))], dim=1)

    whole = around(embeds, planes[0])
    rows = [around(torch.zeros_like(embeds), plane) for plane in planes[1:]]
    ones = torch.ones(embeds.shape[:2], dtype=torch.int64)
    mask = around(ones, where.counts)
    if where.two_way:
        rows.append(around(0 * ones, torch.ones_like(where.counts)))
    if where.positions == "contiguous":
        return whole, mask, torch.arange(whole.shape[1])[None], *rows
    offsets = torch.from_numpy(image.offsets)
    first, *others = (len(text) for text in ones[0].tensor_split(len(spans) + 1))
    position_ids, next_one = [torch.arange(first).expand(*offsets.shape[:-1], -1)], first
    for span, advance, after in zip(spans, image.advances, others, strict=True):
        text = next_one + advance + torch.arange(after)
        position_ids += [next_one + offsets[..., kept[span]], text.expand(*offsets.shape[:-1], -1)]
        next_one += advance + after
    return whole, mask, torch.cat(position_ids, dim=-1)[..., None, :], *rows


def generate(
    decoder: Component,
    model: Any,
    text_config: Any,
    embed: Callable[[Tensor], Tensor],
    prompt: Sequence[Tensor],
    count: int,
) -> NDArray[np.int64]:
    """`count` greedy tokens [count] of the Hugging Face `model` after what `splice` returned."""
    embeds, mask, position_ids, *rows = prompt
    shape = (1, text_config.num_key_value_heads, 0, decoder.outputs[1].shape[3])
    past = tuple(torch.zeros(*map(int, shape)) for _ in range(2 * text_config.num_hidden_layers))
    tokens: list[int] = []
    while len(tokens) < count:
        logits, *present = decoder.reference(model, (embeds, mask, position_ids, *rows, *past))
        past = tuple(present)
        tokens.append(int(logits[0, -1].argmax()))
        embeds = embed(torch.tensor([tokens[-1:]]))
        mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
        position_ids = position_ids[..., -1:] + 1
        rows = [torch.zeros_like(row[:, :1]) for row in rows]
    return np.array(tokens)
