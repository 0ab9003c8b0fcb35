"""Putting the kept rows of the pictures into the prompt, and numbering what results."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from resprune.runtime.errors import ResPruneError

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Picks:
    """Which of a picture's visual tokens are kept: ascending, and in the order they were picked.

    `kept_counts`, in the order of `kept_indices`: how many of the picture's tokens each of them counts for; 1 with
    plain attention.
    """

    kept_indices: Ints
    pick_order: Ints
    kept_counts: Ints


@dataclass(frozen=True)
class KeptTokens:
    """The kept tokens themselves: `rows` [K, D] float32 in ascending order of index.

    `offsets` [K], or [3, K] for positions of three axes: how far each stands from the picture's first token in the
    unpruned prompt; `advance`: how far the text after the picture does.
    """

    rows: Floats
    picks: Picks
    offsets: Ints
    advance: int


@dataclass(frozen=True)
class Spliced:
    """One or more prompts as the language model takes them, shorter ones filled up on the left.

    `inputs_embeds` [B, S, D] float32, `position_ids` [B, S] or [3, B, S] int64, `attention_mask` [B, S] int64: how many
    tokens each row counts for, 0 where there is none.
    """

    inputs_embeds: Floats
    position_ids: Ints
    attention_mask: Ints

    def room(self, context_length: int) -> int:
        """How many tokens an answer may have; `ResPruneError` if the longest prompt leaves none."""
        length = int(self.position_ids.max()) + 1
        if length >= context_length:
            raise ResPruneError(
                f"the question is past the context: {length} tokens with its pictures, limit {context_length}; "
                "ask a shorter one, about fewer pictures, or keep fewer tokens of each"
            )
        return context_length - length


def cut_picks(
    image_features: Floats,
    kept_indices: Ints,
    pick_order: Ints,
    tokens: int | None,
    offsets: Ints,
    advance: int,
    kept_counts: Ints | None = None,
) -> KeptTokens:
    """The first `tokens` picks of one picture, all of them if None: a selection of `tokens` would pick the same.

    `image_features` [K, D], `kept_indices` [K] ascending with −1 last, `pick_order` [K] with −1 last; `offsets`
    [N] or [3, N] and `advance` are the picture's, as in `KeptTokens`; `kept_counts` [K] in the order of
    `kept_indices`, None for 1 each.
    """
    order = pick_order[:tokens]
    order = order[order >= 0]
    valid = kept_indices >= 0
    kept = np.sort(order)
    places = np.searchsorted(kept_indices[valid], kept)  # [K']
    counts = np.ones_like(kept) if kept_counts is None else kept_counts[valid][places]
    picks = Picks(kept, order, counts)
    return KeptTokens(image_features[valid][places], picks, offsets[..., kept], advance)


def splice(
    inputs_embeds: Sequence[Floats],
    ids: Sequence[Sequence[int]],
    pictures: Sequence[Sequence[KeptTokens]],
    *,
    image_token_id: int,
    positions: str,
) -> Spliced:
    """Replace each image token of each prompt by the rows kept of its picture, and fill up to one length.

    `inputs_embeds[b]` [S_b, D] belongs to `ids[b]`; `pictures[b]` has one entry for each image token, in order, and
    at least one. `positions`: `contiguous` numbers what is there 0, 1, 2 …; `original` gives every token, text
    included, the number it has in the unpruned prompt.
    """
    prompts = [
        _splice_one(embeds, np.asarray(row, dtype=np.int64) == image_token_id, kept, positions == "original")
        for embeds, row, kept in zip(inputs_embeds, ids, pictures, strict=True)
    ]
    longest = max(len(rows) for rows, _, _ in prompts)
    batch, width = len(prompts), prompts[0][0].shape[1]
    axes = prompts[0][1].shape[:-1]
    spliced = Spliced(
        np.zeros((batch, longest, width), np.float32),
        np.zeros((*axes, batch, longest), np.int64),
        np.zeros((batch, longest), np.int64),
    )
    for index, (rows, numbers, counts) in enumerate(prompts):
        start = longest - len(rows)
        spliced.inputs_embeds[index, start:] = rows
        spliced.position_ids[..., index, start:] = numbers
        spliced.attention_mask[index, start:] = counts
    return spliced


def _splice_one(
    embeds: Floats, is_image: npt.NDArray[np.bool_], pictures: Sequence[KeptTokens], original: bool
) -> tuple[Floats, Ints, Ints]:
    """One prompt: rows [S, D], their position numbers [S] or [3, S], and what each counts for [S]."""
    axes = pictures[0].offsets.shape[:-1]

    def text_numbers(first: int, count: int) -> Ints:
        return np.broadcast_to(np.arange(first, first + count), (*axes, count))

    pieces: list[npt.NDArray[Any]] = []
    numbers: list[Ints] = []
    counts: list[Ints] = []
    start = number = 0
    for image_at, kept in zip(np.flatnonzero(is_image), pictures, strict=True):
        text = int(image_at) - start
        pieces += [embeds[start:image_at], kept.rows]
        numbers += [text_numbers(number, text), number + text + kept.offsets]
        counts += [np.ones(text, np.int64), kept.picks.kept_counts]
        start = int(image_at) + 1
        number += text + kept.advance
    pieces.append(embeds[start:])
    numbers.append(text_numbers(number, len(embeds) - start))
    counts.append(np.ones(len(embeds) - start, np.int64))
    rows = np.concatenate(pieces)
    placed = np.concatenate(numbers, axis=-1) if original else text_numbers(0, len(rows))
    return rows, placed, np.concatenate(counts)
