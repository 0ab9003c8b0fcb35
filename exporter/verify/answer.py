"""A whole answer as the reference gives it: a prompt around one pruned image, and greedy tokens after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resprune.exporter.components import Component


@dataclass(frozen=True)
class Where:
    """Which tokens of an image are kept, and where they stand."""

    picks: Tensor
    """[1, K], in the order of choice, -1 past the last."""
    counts: Tensor
    """[1, K]: how many tokens each kept one stands for, in the image's order."""
    places: Tensor
    """[N] or [3, N]: position ids of all the image's tokens, counted from its first."""
    advance: int
    """How far the text after the image is moved."""
    positions: str
    """The policy for position ids."""
    two_way: bool
    """Whether the rows of an image attend to each other in both directions."""


def splice(embeds: Tensor, planes: Sequence[Tensor], where: Where) -> tuple[Tensor, ...]:
    """The decoder's inputs up to the past, for a prompt [1, S', D] with the image's rows in the middle.

    They are the embeddings [1, S, D], the mask [1, S], the position ids [1, S] or [3, 1, S], and what more is said of
    each row. `planes` are [1, K, D] each, the main one first.
    """
    half = embeds.shape[1] // 2
    kept = where.picks[0][where.picks[0] >= 0].sort().values

    def around(text: Tensor, rows: Tensor) -> Tensor:
        return torch.cat([text[:, :half], rows[:, : len(kept)], text[:, half:]], dim=1)

    whole = around(embeds, planes[0])
    rows = [around(torch.zeros_like(embeds), plane) for plane in planes[1:]]
    mask = torch.ones(whole.shape[:2], dtype=torch.int64)
    mask[:, half : half + len(kept)] = where.counts[:, : len(kept)]
    if where.two_way:
        rows.append(torch.zeros_like(mask).index_fill_(1, half + torch.arange(len(kept)), 1))
    if where.positions == "contiguous":
        return whole, mask, torch.arange(whole.shape[1])[None], *rows
    axes = where.places.shape[:-1]
    before = torch.arange(half).expand(*axes, -1)
    after = (torch.arange(embeds.shape[1] - half) + half + where.advance).expand(*axes, -1)
    position_ids = torch.cat([before, half + where.places[..., kept], after], dim=-1)[..., None, :]
    return whole, mask, position_ids, *rows


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
