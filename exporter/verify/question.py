"""A seeded question about seeded images: the runtime's walk over them, and what PyTorch selects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resprune.exporter.components import Components
from resprune.exporter.verify.feeds import array, feeds
from resprune.exporter.verify.pruning import TEXT_TOKENS
from resprune.exporter.verify.reference import (
    choice,
    keep,
    picks_within_rounding,
    select,
    with_attached,
)
from resprune.method import Selection
from resprune.names import (
    KEPT_INDICES,
    PICK_ORDER,
)
from resprune.runtime.backends.backend import Embedding
from resprune.runtime.backends.session import GraphRunner
from resprune.runtime.bundle.files import Bundle
from resprune.runtime.families.preprocessor import Arrays, PreparedImage
from resprune.runtime.walk import Encoded, Walk


@dataclass(frozen=True)
class Question:
    """Images as the vision graph takes them, nouns [B, M, D], and their mask [B, M] bool."""

    components: Components
    images: tuple[Tensor, ...]
    nouns: Tensor
    mask: Tensor

    @cached_property
    def prepared(self) -> list[Encoded]:
        """The images as the runtime has them before they are encoded, but for their pixels."""
        if self.components.images is not None:
            images = self.components.images(self.images)
        else:
            candidates = self.candidates()
            if candidates is None:
                candidates = torch.ones(len(self.nouns), self.components.num_tokens or 0)
            counts = candidates.sum(dim=1).int().tolist()
            images = [PreparedImage.one_span({}, np.arange(count), count) for count in counts]
        rules = [
            [None] * len(images) if rows is None else [array(row) for row in rows]
            for rows in (self.protected(), self.attached_to)
        ]
        encoded = []
        for image, *own in zip(images, *rules, strict=True):
            protected, attached_to = (None if row is None else row[: image.num_tokens] for row in own)
            encoded.append(Encoded(replace(image, protected=protected, attached_to=attached_to)))
        return encoded

    @property
    def words(self) -> list[NDArray[np.float32]]:
        """The nouns [M_i, D] of each image."""
        return [array(rows[mask]) for rows, mask in zip(self.nouns, self.mask, strict=True)]

    def candidates(self, left: Tensor | None = None) -> Tensor | None:
        """Which of the N tokens each image has, [B, N] bool; None: all of them. `left`: those that its tower left."""
        if left is not None:
            return left
        if self.components.padding is None:
            return None
        names = [spec.name for spec in self.components.vision.inputs]
        has = self.images[names.index(self.components.padding)] >= 0
        return has if has.dim() == 2 else has[:, :, 0]

    def protected(self, left: Tensor | None = None) -> Tensor | None:
        """Which of the N tokens are always kept, [B, N] bool; None: the family protects none."""
        if self.components.protected is None:
            return None
        protected = self.components.protected(self.images)
        candidates = self.candidates(left)
        return protected if candidates is None else protected & candidates

    @property
    def attached_to(self) -> Tensor | None:
        """Which of the N tokens each is attached to, [B, N] int64; None: the family attaches none."""
        return None if self.components.attached_to is None else self.components.attached_to(self.images)

    def select(self, model: Any, selection: Selection, early: Tensor | None = None) -> Selected:
        """What the reference selects; `early` [T, C] takes the place of its picks inside the tower."""
        vision = self.components.vision
        with torch.no_grad():
            outputs = vision.reference(model, self.images, *(() if early is None else (early,)))
        count = len(self.components.features)
        planes, further = outputs[:count], outputs[count:]
        left, early = further if vision.early else (None, None)
        rules = self.candidates(left), self.protected(left), self.attached_to
        gain, picks = select(planes[0], self.nouns, self.mask, selection, *rules)
        return Selected(self, list(planes), gain, picks, left, early)


class QuestionWalk(Walk):
    """The runtime's walk, on a question's images."""

    def __init__(self, bundle: Bundle, graphs: GraphRunner, question: Question) -> None:
        super().__init__(bundle, graphs, Embedding(graphs))
        self._question = question

    def pixels(self, images: Sequence[PreparedImage]) -> Arrays:
        """What the vision graph takes: seeded numbers, all images at once."""
        return feeds(self._question.components.vision, self._question.images)


@dataclass(frozen=True)
class Selected:
    """Planes of a question's candidates, the main one first, their gain, and the order of picks.

    Of a tower that selects, `left` [B, N] bool are the tokens that its selection left, and `early` [T, C] its picks.
    """

    question: Question
    planes: list[Tensor]
    gain: Tensor
    picks: Tensor
    left: Tensor | None = None
    early: Tensor | None = None

    @property
    def candidates(self) -> Tensor | None:
        """As `Question.candidates`."""
        return self.question.candidates(self.left)

    def equal_picks(self, got: Mapping[str, NDArray[Any]]) -> Tensor:
        """Which picks of a graph's outputs are these, as far as float32 can tell: bools, without those of no pick."""
        order = torch.from_numpy(got[PICK_ORDER])
        same = order == self.picks
        if not same.all():
            same |= self._within_rounding(order)
        _, indices = keep(self.planes[0], order)
        same &= torch.from_numpy(got[KEPT_INDICES]) == indices
        return same[(order >= 0) | (self.picks >= 0)]

    def _within_rounding(self, order: Tensor) -> Tensor:
        """Which picks float32 cannot tell from the reference's.

        Of protected rows, which go by index, it can any; an attached one is right where its owner is.
        """
        features, gain = self.planes[0], self.gain
        protected, attached_to = self.question.protected(self.left), self.question.attached_to
        free = choice(self.candidates, protected, attached_to)
        if protected is None and attached_to is None:
            return picks_within_rounding(features, gain, order, free)
        assert free is not None
        rows = order.clamp(min=0)
        chosen = free.gather(1, rows) & (order >= 0)
        places = chosen.cumsum(dim=1) - 1  # of the last that was chosen
        within = picks_within_rounding(features, gain, _alone(order, chosen), free)
        within = within.gather(1, places.clamp(min=0)) & (places >= 0)
        if attached_to is None:
            return within & chosen
        owners = (attached_to.gather(1, rows) < 0) & (order >= 0)
        grouped = with_attached(attached_to, _alone(order, owners), self.candidates)
        return within & (chosen | ~owners) & (order >= 0) & (order == grouped)


def _alone(order: Tensor, some: Tensor) -> Tensor:
    """Those of an order of picks [B, K] that `some` [B, K] says, as they follow each other, and −1 behind them."""
    first = (~some).int().argsort(dim=1, stable=True)
    return order.masked_fill(~some, -1).gather(1, first)


def seeded(
    components: Components,
    embeds: Callable[[Tensor], Tensor],
    vocab_size: int,
    sizes: Mapping[str, int],
    seed: int,
) -> Question:
    """A question of `sizes`, or of as many images as the vision graph takes, with padding in the last one's row.

    `embeds` is the embedding of token ids.
    """
    fixed = components.vision.outputs[0].shape[0]
    batch_size = fixed if isinstance(fixed, int) else sizes["batch_size"]
    generator = torch.Generator().manual_seed(seed)
    images = components.vision.samples({**sizes, "batch_size": batch_size}, generator)
    ids = torch.randint(vocab_size, (batch_size, TEXT_TOKENS), generator=generator)
    mask = torch.ones(batch_size, TEXT_TOKENS, dtype=torch.bool)
    mask[-1, 2:] = False
    return Question(components, images, embeds(ids), mask)
