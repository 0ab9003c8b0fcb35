"""Put the kept rows of the images into the prompt, and number what results."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from resprune.names import IMAGE_NUMBERS, PLANE_EMBEDS
from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.preprocessor import PreparedImage

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Picks:
    """Which of an image's visual tokens are kept: `kept_indices` [K] int64 ascending, `pick_order` [K] as picked.

    `kept_counts` [K], in the order of `kept_indices`: how many of the image's tokens each of them counts for; 1 with
    plain attention. `candidates` ascending are the tokens that a selection inside the vision tower left; None: all.
    """

    kept_indices: Ints
    pick_order: Ints
    kept_counts: Ints
    candidates: Ints | None = None


@dataclass(frozen=True)
class KeptTokens:
    """The kept tokens themselves: `rows` [K, D] float32 in ascending order of index.

    `offsets` [K] or [3, K], `advances` and `spans` as in `PreparedImage`, with the kept tokens of each span alone.
    `planes`: the same tokens' rows [K, D] in the image's further planes.
    """

    rows: Floats
    picks: Picks
    offsets: Ints
    advances: tuple[int, ...]
    spans: tuple[int, ...]
    planes: tuple[Floats, ...] = ()


@dataclass(frozen=True)
class Spliced:
    """One or more prompts as the language model takes them, shorter ones filled up on the left.

    `inputs_embeds` [B, S, D] float32, `position_ids` [B, S] or [3, B, S] int64, `attention_mask` [B, S] int64: how many
    tokens each row counts for, 0 where there is none. `row_inputs`: further inputs of the decoder, [B, S, …] each;
    a decoder takes those that it has.
    """

    inputs_embeds: Floats
    position_ids: Ints
    attention_mask: Ints
    row_inputs: dict[str, Array] = field(default_factory=dict)

    @cached_property
    def following(self) -> Ints:
        """`position_ids` [B, 1] or [3, B, 1] of the token after each prompt: one past its furthest position."""
        axes = (*range(self.position_ids.ndim - 2), -1)
        furthest: Ints = self.position_ids.max(axis=axes, keepdims=True)
        return furthest + np.ones_like(self.position_ids[..., :1])

    def ahead(self, row: int) -> int:
        """How far the position after prompt `row` is ahead of the number of its rows."""
        return int(self.following[..., row, 0].max() - np.count_nonzero(self.attention_mask[row]))

    def room(self, context_length: int) -> int:
        """How many tokens an answer may have; `ResPruneError` if the longest prompt leaves none."""
        length = int(self.following.max())
        if length >= context_length:
            raise ResPruneError(
                f"the question is past the context: {length} tokens with its images, limit {context_length}; "
                "ask a shorter one, about fewer images, or keep fewer tokens of each"
            )
        return context_length - length


def keep(
    image: PreparedImage,
    image_features: Floats,
    pick_order: Ints,
    kept_counts: Ints | None = None,
    planes: Sequence[Floats] = (),
    left: Bools | None = None,
) -> KeptTokens:
    """The tokens `pick_order` [K] of an image, out of all of its rows.

    `image_features` [N, D] and each of `planes` [N, D]; `kept_counts` [K] by ascending index, None for 1 each; `left`
    [N] as in `Features`.
    """
    kept = np.sort(pick_order)
    counts = np.ones_like(kept) if kept_counts is None else kept_counts
    return _kept(
        image,
        image_features[kept],
        Picks(kept, pick_order, counts, _indices(left)),
        tuple(plane[kept] for plane in planes),
    )


def keep_all(
    image: PreparedImage, image_features: Floats, planes: Sequence[Floats] = (), left: Bools | None = None
) -> KeptTokens:
    """Every token of an image at its own place, of those that its vision tower left: the unpruned prompt."""
    every = np.arange(image.num_tokens) if left is None else np.flatnonzero(left)
    return keep(image, image_features, every, None, planes, left)


def cut_picks(
    image: PreparedImage,
    image_features: Floats,
    kept_indices: Ints,
    pick_order: Ints,
    tokens: int | None,
    kept_counts: Ints | None = None,
    planes: Sequence[Floats] = (),
    left: Bools | None = None,
) -> KeptTokens:
    """The first `tokens` picks of one image, all of them if None: a selection of `tokens` would pick the same.

    Of tokens that are attached to another, see `whole_groups`.
    `image_features` [K, D] and `planes` [K, D], rows of `kept_indices` [K], which ascend with −1 last; `pick_order` [K]
    with −1 last; `kept_counts` [K] in the order of `kept_indices`, None for 1 each; `left` [N] as in `Features`.
    """
    order = whole_groups(pick_order[pick_order >= 0], tokens, image.attached_to)
    kept = np.sort(order)
    valid = kept_indices >= 0
    places = np.flatnonzero(valid)[np.searchsorted(kept_indices[valid], kept)]  # [K']
    counts = np.ones_like(kept) if kept_counts is None else kept_counts[places]
    return _kept(
        image,
        image_features[places],
        Picks(kept, order, counts, _indices(left)),
        tuple(plane[places] for plane in planes),
    )


def whole_groups(order: Ints, tokens: int | None, attached_to: Ints | None) -> Ints:
    """The first `tokens` of an order of picks [P], all of them if None, without the part of a group at the end.

    In the order, the tokens that `attached_to` [N] attaches to a pick stand behind it; they and it are a group.
    """
    if tokens is None or tokens >= len(order):
        return order
    while attached_to is not None and attached_to[order[tokens]] >= 0:
        tokens -= 1
    return order[:tokens]


def _indices(left: Bools | None) -> Ints | None:
    return None if left is None else np.flatnonzero(left)


def _kept(image: PreparedImage, rows: Floats, picks: Picks, planes: tuple[Floats, ...]) -> KeptTokens:
    ends = [0, *np.searchsorted(picks.kept_indices, np.cumsum(image.spans)).tolist()]
    spans = tuple(end - start for start, end in pairwise(ends))
    return KeptTokens(rows, picks, image.offsets[..., picks.kept_indices], image.advances, spans, planes)


def splice(
    inputs_embeds: Sequence[Floats],
    ids: Sequence[Sequence[int]],
    images: Sequence[Sequence[KeptTokens]],
    *,
    image_token_id: int,
    positions: str,
    axes: tuple[int, ...] = (),
) -> Spliced:
    """Replace each image token of each prompt by the rows kept of its span, and fill up to one length.

    `inputs_embeds[b]` [S_b, D] belongs to `ids[b]`, which has an image token for each span of `images[b]`, in order.
    `positions`: `contiguous` numbers what is there 0, 1, 2 …; `original` gives every token, text included, the number
    it has in the unpruned prompt. `axes`: (3,) where prompts without an image have position ids [3, B, S], as M-RoPE's.
    """
    prompts = [
        _splice_one(
            embeds, np.asarray(row, dtype=np.int64) == image_token_id, kept, axes, positions == "original"
        )
        for embeds, row, kept in zip(inputs_embeds, ids, images, strict=True)
    ]
    longest = max(len(prompt.rows) for prompt in prompts)
    batch, width = len(prompts), prompts[0].rows.shape[1]
    axes = prompts[0].numbers.shape[:-1]
    row_inputs: dict[str, Array] = {IMAGE_NUMBERS: np.zeros((batch, longest), np.int64)}
    for plane in range(max(len(prompt.planes) for prompt in prompts)):
        row_inputs[PLANE_EMBEDS.format(plane)] = np.zeros((batch, longest, width), np.float32)
    spliced = Spliced(
        np.zeros((batch, longest, width), np.float32),
        np.zeros((*axes, batch, longest), np.int64),
        np.zeros((batch, longest), np.int64),
        row_inputs,
    )
    for index, prompt in enumerate(prompts):
        start = longest - len(prompt.rows)
        spliced.inputs_embeds[index, start:] = prompt.rows
        spliced.position_ids[..., index, start:] = prompt.numbers
        spliced.attention_mask[index, start:] = prompt.counts
        row_inputs[IMAGE_NUMBERS][index, start:] = prompt.image_numbers
        for plane, rows in enumerate(prompt.planes):
            row_inputs[PLANE_EMBEDS.format(plane)][index, start:][prompt.image_numbers > 0] = rows
    return spliced


@dataclass(frozen=True)
class _OnePrompt:
    """One prompt of S rows: what each counts for, its position numbers, and its image; `planes` of image rows alone."""

    rows: Floats  # [S, D]
    numbers: Ints  # [S] or [3, S]
    counts: Ints  # [S]
    image_numbers: Ints  # [S]
    planes: list[Floats]


@dataclass(frozen=True)
class _Span:
    """The rows kept of one span of an image."""

    image_number: int
    rows: Floats
    counts: Ints
    offsets: Ints
    advance: int


def _spans(images: Sequence[KeptTokens]) -> Iterator[_Span]:
    for number, kept in enumerate(images, 1):
        ends = np.cumsum(kept.spans)
        for end, count, advance in zip(ends, kept.spans, kept.advances, strict=True):
            of_span = slice(int(end) - count, int(end))
            yield _Span(
                number,
                kept.rows[of_span],
                kept.picks.kept_counts[of_span],
                kept.offsets[..., of_span],
                advance,
            )


def _splice_one(
    embeds: Floats,
    is_image: npt.NDArray[np.bool_],
    images: Sequence[KeptTokens],
    axes: tuple[int, ...],
    original: bool,
) -> _OnePrompt:
    axes = images[0].offsets.shape[:-1] if images else axes

    def text_numbers(first: int, count: int) -> Ints:
        return np.broadcast_to(np.arange(first, first + count), (*axes, count))

    rows: list[Floats] = []
    numbers: list[Ints] = []
    counts: list[Ints] = []
    image_numbers: list[Ints] = []
    start = number = 0
    for image_at, span in zip(np.flatnonzero(is_image), _spans(images), strict=True):
        text = int(image_at) - start
        rows += [embeds[start:image_at], span.rows]
        numbers += [text_numbers(number, text), number + text + span.offsets]
        counts += [np.ones(text, np.int64), span.counts]
        image_numbers += [np.zeros(text, np.int64), np.full(len(span.rows), span.image_number)]
        start = int(image_at) + 1
        number += text + span.advance
    text = len(embeds) - start
    rows.append(embeds[start:])
    numbers.append(text_numbers(number, text))
    counts.append(np.ones(text, np.int64))
    image_numbers.append(np.zeros(text, np.int64))
    whole = np.concatenate(rows)
    return _OnePrompt(
        whole,
        np.concatenate(numbers, axis=-1) if original else text_numbers(0, len(whole)),
        np.concatenate(counts),
        np.concatenate(image_numbers),
        [np.concatenate(planes) for planes in zip(*(image.planes for image in images), strict=True)],
    )
