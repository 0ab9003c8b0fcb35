"""Training batches: pictures, and tokenised questions with the places where an answer is scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import LlavaProcessor

from demo.data import PictureSet
from demo.vocabulary import EOS, IMAGE

IGNORED = -100
_WIDTH = 40  # tokens reserved for one question with its answer


@dataclass
class Tokenised:
    """Rows of ``PictureSet.table`` as tokens: [T, 40] ids, their lengths, and where answers begin."""

    ids: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    answers: npt.NDArray[np.int64]


@dataclass
class Batch:
    """A training step's input.

    ``pixel_values`` [B + U, 3, 96, 96]; ``questions`` and ``targets`` [B, Q, S], on the first B
    pictures, the target at a position being the token to predict there, -100 where nothing is
    scored; ``owner`` and ``attributes`` as in :class:`demo.data.PictureSet`, for all pictures.
    """

    pixel_values: Tensor
    questions: Tensor
    targets: Tensor
    owner: Tensor
    attributes: Tensor


def prompt_start(processor: LlavaProcessor) -> list[int]:
    """Return the ids that stand before the picture: ``<s>USER: ``."""
    ids: list[int] = processor.tokenizer(f"USER: {IMAGE}")["input_ids"]
    return ids[:-1]


def tokenise(
    processor: LlavaProcessor, table: list[tuple[str, str, str]], *, follow_up: bool = False
) -> Tokenised:
    """Tokenise what follows the picture in the prompt, or a chat's second question and answer."""
    tokenizer = processor.tokenizer
    head = "USER: " if follow_up else f"USER: {IMAGE}\n"
    picture = tokenizer(f"USER: {IMAGE}", add_special_tokens=False).input_ids
    dropped = 0 if follow_up else len(picture)
    ids = np.full((len(table), _WIDTH), tokenizer.pad_token_id, np.int64)
    lengths = np.zeros(len(table), np.int64)
    answers = np.zeros(len(table), np.int64)
    texts = [f"{head}{text} ASSISTANT: {answer}{EOS}" for _, text, answer in table]
    # An answer's first token begins with the space before it, so it is the same alone.
    endings = sorted({answer for _, _, answer in table})
    encoded = tokenizer([f" {answer}{EOS}" for answer in endings], add_special_tokens=False).input_ids
    ending_length = dict(zip(endings, map(len, encoded), strict=True))
    whole = tokenizer(texts, add_special_tokens=False).input_ids
    for row, (tokens, (_, _, answer)) in enumerate(zip(whole, table, strict=True)):
        lengths[row] = len(tokens) - dropped
        answers[row] = lengths[row] - ending_length[answer]
        ids[row, : lengths[row]] = tokens[dropped:]
    return Tokenised(ids, lengths, answers)


def normalise(images: npt.NDArray[np.uint8], processor: LlavaProcessor) -> Tensor:
    """Return pictures [B, 96, 96, 3] uint8 as pixel values [B, 3, 96, 96], as the processor does."""
    pictures = processor.image_processor
    mean, std = (torch.tensor(v) for v in (pictures.image_mean, pictures.image_std))
    pixels = torch.from_numpy(images).float() / 255
    return ((pixels - mean) / std).permute(0, 3, 1, 2).contiguous()


def targets_of(
    ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], answers: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Return the next token at the places that predict the answer and ``</s>``, -100 elsewhere."""
    targets = np.full_like(ids, IGNORED)
    targets[..., :-1] = ids[..., 1:]
    place = np.arange(ids.shape[-1])
    scored = (place >= answers[..., None] - 1) & (place < lengths[..., None] - 1)
    targets[~scored] = IGNORED
    return targets


class BatchSampler:
    """Draws batches that mix scenes and easy-VQA pictures."""

    def __init__(
        self,
        processor: LlavaProcessor,
        scenes: PictureSet,
        easy: PictureSet,
        easy_share: float,
        emphasis: Mapping[str, float],
    ) -> None:
        """Tokenise both sets' questions; ``easy_share`` of a batch's pictures are easy-VQA's.

        ``emphasis``: how many times as likely as others the questions of a type are drawn.
        """
        self.processor = processor
        self.sets = (scenes, easy)
        self.first = tuple(tokenise(processor, s.table) for s in self.sets)
        self.second = tuple(tokenise(processor, s.table, follow_up=True) for s in self.sets)
        self.rarity = tuple(
            np.asarray([1.0 / emphasis.get(type_, 1.0) for type_, _, _ in s.table]) for s in self.sets
        )
        self.easy_share = easy_share
        used = self.first[0].lengths[scenes.question_ids.ravel()]
        self.short = int(np.quantile(used, 0.55))
        self.long = int(used.max())
        self.short_share = float((used <= self.short).mean())

    def draw(
        self,
        rng: np.random.Generator,
        pictures: int,
        questions: int,
        *,
        unasked: int = 0,
        short: bool = False,
        chat: bool = False,
    ) -> Batch:
        """Return a batch of ``pictures`` x ``questions``; with ``chat`` each has two turns.

        ``unasked`` more scenes come last, without questions.

        Short and long questions come in separate batches so that little is padding; draw ``short``
        ones with the probability ``short_share``.
        """
        n_easy = round(pictures * self.easy_share)
        width = self.short if short else self.long
        parts = [
            self._part(which, rng, count, questions, short, chat)
            for which, count in enumerate((pictures - n_easy, n_easy))
        ]
        ids, targets = (np.concatenate([p[i] for p in parts]) for i in (0, 1))
        if chat:
            width = int((targets != IGNORED).any((0, 1)).nonzero()[0].max()) + 2
        more = rng.integers(0, len(self.sets[0]), unasked)
        shown = [(s, p[2]) for s, p in zip(self.sets, parts, strict=True)] + [(self.sets[0], more)]
        images, owner, attributes = (
            np.concatenate([getattr(source, name)[rows] for source, rows in shown])
            for name in ("images", "owner", "attributes")
        )
        return Batch(
            normalise(images, self.processor),
            torch.from_numpy(ids[..., :width]),
            torch.from_numpy(targets[..., :width]),
            torch.from_numpy(owner),
            torch.from_numpy(attributes),
        )

    def _part(
        self,
        which: int,
        rng: np.random.Generator,
        count: int,
        questions: int,
        short: bool,
        chat: bool,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        source, tokens = self.sets[which], self.first[which]
        rows = rng.integers(0, len(source), count)
        offered = source.question_ids[rows]  # [count, offered]
        lengths = tokens.lengths[offered]
        wanted = (offered >= 0) & ((lengths <= self.short) == short) if not chat else offered >= 0
        # Wanted questions first, in a random order weighted by emphasis (an exponential race); the
        # rest fill up and are not scored.
        race = rng.exponential(size=offered.shape) * self.rarity[which][offered]
        order = np.argsort(race + 1e6 * ~wanted, axis=1)
        repeats = -(-questions // order.shape[1])
        order = np.tile(order, (1, repeats))[:, :questions]
        chosen = np.take_along_axis(offered, order, 1)
        fits = np.take_along_axis(wanted, order, 1)
        ids = tokens.ids[chosen]
        targets = targets_of(ids, tokens.lengths[chosen], tokens.answers[chosen])
        targets[~fits] = IGNORED
        if chat:
            ids, targets = self._two_turns(which, chosen, ids, targets)
            targets[~(fits & np.roll(fits, 1, 1))] = IGNORED
        return ids, targets, rows

    def _two_turns(
        self,
        which: int,
        chosen: npt.NDArray[np.int32],
        ids: npt.NDArray[np.int64],
        targets: npt.NDArray[np.int64],
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        later = self.second[which]
        other = np.roll(chosen, 1, 1)
        next_ids = later.ids[other]
        next_targets = targets_of(next_ids, later.lengths[other], later.answers[other])
        begin = self.first[which].lengths[chosen]
        wide = (*ids.shape[:2], 2 * _WIDTH)
        both = np.full(wide, self.processor.tokenizer.pad_token_id, np.int64)
        scored = np.full(wide, IGNORED, np.int64)
        both[..., :_WIDTH], scored[..., :_WIDTH] = ids, targets
        place = begin[..., None] + np.arange(_WIDTH)
        np.put_along_axis(both, place, next_ids, 2)
        np.put_along_axis(scored, place, next_targets, 2)
        return both, scored
