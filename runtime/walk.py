"""The one walk from images to answers: encode, embed, select, splice, prefill, step.

The pipeline, the evaluation, the benchmarks and the export's own proof all take it, and differ in what they put
between two stages. The PyTorch oracle of the exporter is the only second implementation.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from resprune.names import (
    ATTACHED_TO,
    IMAGE_FEATURES,
    KEPT_COUNTS,
    KEPT_FEATURES,
    KEPT_INDICES,
    KEPT_PLANES,
    NUM_KEPT,
    PICK_ORDER,
    PLANE_FEATURES,
    PROTECTED_MASK,
    TEXT_EMBEDS,
    TEXT_MASK,
    TOKEN_MASK,
    TOKEN_SELECT,
    VISION_ENCODER,
    VISION_SELECT,
)
from resprune.runtime.backends.backend import Backend, EmbedTokens, Piece, Request
from resprune.runtime.backends.session import GraphRunner
from resprune.runtime.bundle.files import Bundle
from resprune.runtime.bundle.manifest import Manifest
from resprune.runtime.errors import ResPruneError, shown
from resprune.runtime.families.preprocessor import Arrays, PreparedImage, Preprocessor
from resprune.runtime.families.table import family_of
from resprune.runtime.prompt.prompter import Prompt
from resprune.runtime.prompt.splice import Bools, Floats, Ints, KeptTokens, cut_picks, keep_all, splice
from resprune.runtime.sampling import Sampling

SPLIT = (VISION_ENCODER, TOKEN_SELECT)


@dataclass(frozen=True)
class Features:
    """All tokens of one image: the main plane `rows` [N, D] float32, and its further `planes`, each [N, D].

    `left` [N] bool are the tokens that a selection inside the vision tower left, the others' rows being zeros; None if
    there was none.
    """

    rows: Floats
    planes: tuple[Floats, ...] = ()
    left: Bools | None = None

    @property
    def candidates(self) -> Ints:
        """The tokens that a selection chooses from, ascending; those that are protected are kept whatever it does."""
        return np.arange(len(self.rows)) if self.left is None else np.flatnonzero(self.left)


@dataclass(frozen=True)
class Encoded:
    """An image that is ready to be selected from.

    `features` are all of its tokens where the bundle can encode it apart from a question; None where they are not made
    yet, or the fused graph encodes and selects at once.
    """

    image: PreparedImage
    features: Features | None = None

    @property
    def tokens(self) -> Features:
        """`features` of an image that was encoded."""
        assert self.features is not None
        return self.features

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        one = self.features
        arrays = [*self.image.arrays.values(), *((one.rows, *one.planes, one.left) if one else ())]
        return sum(array.nbytes for array in arrays if array is not None)


class Walk:
    """The stages of one bundle. It keeps nothing of a question: any number of threads may use it at once."""

    def __init__(self, bundle: Bundle, graphs: GraphRunner, embed_tokens: EmbedTokens) -> None:
        self.manifest: Manifest = bundle.manifest
        family = family_of(bundle)
        self.preprocessor: Preprocessor = family.preprocessor(bundle)
        self._axes = (family.position_axes,) if family.position_axes > 1 else ()
        self._graphs = graphs
        self._early = self.manifest.early is not None
        self._planes = self.manifest.num_planes
        self.embed_tokens = embed_tokens

    @property
    def splits(self) -> bool:
        """Whether the bundle has the encoder and the selector apart (`resprune export --split`)."""
        return self.manifest.graphs.keys() >= {*SPLIT}

    @property
    def vision_graphs(self) -> tuple[str, ...]:
        """The graphs from pixels to kept tokens: a split bundle's fused one, a second tower in memory, is not run."""
        return SPLIT if self.splits else (VISION_SELECT,)

    def pixels(self, images: Sequence[PreparedImage]) -> Arrays:
        """What the vision graph takes of images that go through it together."""
        return self.preprocessor.batch(images)

    def encode(self, images: Sequence[PreparedImage]) -> list[Encoded]:
        """Encode images, if the bundle has the encoder apart; else only hold them, with `features` None."""
        if not self.splits:
            return list(map(Encoded, images))
        outputs = [IMAGE_FEATURES, *map(PLANE_FEATURES.format, range(self._planes))]
        outputs += [TOKEN_MASK] * self._early
        encoded: list[Encoded] = []
        for start, stop in self._batches(len(images)):
            batch = images[start:stop]
            arrays = self._graphs.run(VISION_ENCODER, self.pixels(batch), outputs)
            masks = arrays.pop() if self._early else [None] * len(batch)
            for image, mask, *planes in zip(batch, masks, *arrays, strict=True):
                rows, *further = (plane[: image.num_tokens] for plane in planes)
                left = None if mask is None else mask[: image.num_tokens]
                encoded.append(Encoded(image, Features(rows, tuple(further), left)))
        return encoded

    def embed(self, prompts: Sequence[Prompt]) -> list[Floats]:
        """Input embeddings [S_b, D] float32 of each prompt; the rows of its image tokens are placeholders.

        Raises `ResPruneError` for a token that the model's table does not have.
        """
        ids = np.concatenate([prompt.ids_to_embed(self.manifest.image_token_id) for prompt in prompts])
        try:
            embeds = self.embed_tokens(ids[None])[0]  # [S_0 + S_1 + …, D]
        except ResPruneError as error:
            past = re.search(r"idx=([0-9]+)", str(error))  # as ONNX Runtime's Gather says it
            if past is None:
                raise
            raise ResPruneError(
                f"the prompt has the token {past[1]}, and the model's table ends before it; leave that special token "
                "out of the question, or ask with plain_text (--plain-text)"
            ) from None
        return np.split(embeds, np.cumsum([len(prompt.ids) for prompt in prompts])[:-1])

    def keywords(self, prompt: Prompt, embeds: Floats) -> Floats:
        """Embeddings [M, D] float32 of a prompt's keywords, M may be 0; `embeds` [S, D] are the prompt's."""
        rows = embeds[prompt.text_positions]
        if not prompt.further_ids:
            return rows
        further = self.embed_tokens(np.array([prompt.further_ids], dtype=np.int64))[0]
        return np.concatenate([rows, further])

    def select(
        self, encoded: Sequence[Encoded], text: Sequence[Floats], tokens: Sequence[int | None]
    ) -> list[KeptTokens]:
        """The tokens of each image that its question keeps.

        `text[i]` [M_i, D] float32 are the embeddings of the keywords asked about image i, M_i may be 0; `tokens[i]` is
        how many are kept of it (see `budgets`).
        """
        if not encoded:
            return []
        budgets = self.budgets([one.image for one in encoded], tokens)
        if self.splits and any(one.features is None for one in encoded):
            encoded = self.encode([one.image for one in encoded])
        kept: list[KeptTokens] = []
        most = self.manifest.selection.k
        if max(budgets) > most:  # those are kept whole, without the selector
            for one, words, budget in zip(encoded, text, budgets, strict=True):
                kept += [_whole(one)] if budget > most else self._select_batch([one], [words], [budget])
            return kept
        for start, stop in self._batches(len(encoded)):
            of_batch = slice(start, stop)
            kept += self._select_batch(encoded[of_batch], text[of_batch], budgets[of_batch])
        return kept

    def budgets(self, images: Sequence[PreparedImage], tokens: Sequence[int | None]) -> list[int]:
        """How many tokens are kept of each image; None is what the bundle was exported to keep.

        1 to K, and all of an image whose encoder the bundle has apart; `ResPruneError` for another number.
        """
        selection = self.manifest.selection
        budgets = []
        for image, wanted in zip(images, tokens, strict=True):
            budget = selection.budget(image.num_tokens) if wanted is None else wanted
            whole = self.splits and budget == image.num_tokens
            if not (1 <= budget <= selection.k or whole):
                raise ResPruneError(
                    f"this bundle keeps {selection.k} tokens of an image, so tokens should be 1 to {selection.k}, "
                    f"not {shown(budget)}; export with a larger -k for more"
                )
            budgets.append(budget)
        return budgets

    def _select_batch(
        self, encoded: Sequence[Encoded], text: Sequence[Floats], budgets: Sequence[int]
    ) -> list[KeptTokens]:
        images = [one.image for one in encoded]
        features = [one.features for one in encoded if one.features is not None]
        text_embeds, text_mask = pad_rows(text)
        feeds: Arrays = {TEXT_EMBEDS: text_embeds, TEXT_MASK: text_mask}
        left: Sequence[Bools | None] = [one.left for one in features]
        if features:
            graph, rows, planes = TOKEN_SELECT, KEPT_FEATURES, KEPT_PLANES
            feeds[IMAGE_FEATURES], mask = pad_rows([one.rows for one in features])
            for row, of_image in zip(mask, left, strict=True):
                if of_image is not None:
                    row[: len(of_image)] &= of_image
            feeds[TOKEN_MASK] = mask
            for plane in range(self._planes):
                feeds[PLANE_FEATURES.format(plane)], _ = pad_rows([one.planes[plane] for one in features])
        else:
            graph, rows, planes = VISION_SELECT, IMAGE_FEATURES, PLANE_FEATURES
            feeds |= self.pixels(images)
        inputs = {tensor.name: tensor for tensor in self.manifest.graphs[graph].inputs}
        if PROTECTED_MASK in inputs:
            feeds[PROTECTED_MASK] = _padded([image.protected for image in images], images, False)
        if ATTACHED_TO in inputs:
            feeds[ATTACHED_TO] = _padded([image.attached_to for image in images], images, -1)
        outputs = [rows, KEPT_INDICES, PICK_ORDER, *map(planes.format, range(self._planes))]
        counting = self.manifest.selection.counts
        if counting:
            feeds[NUM_KEPT] = np.array(budgets, np.int64)
            outputs.append(KEPT_COUNTS)
        early = self._early and not features
        outputs += [TOKEN_MASK] * early
        arrays = self._graphs.run(graph, feeds, outputs)
        if early:
            left = [mask[: one.num_tokens] for mask, one in zip(arrays.pop(), images, strict=True)]
        counts = arrays.pop() if counting else [None] * len(images)
        return [
            cut_picks(image, rows_of, indices, order, budget, counts_of, planes_of, left_of)
            for image, budget, counts_of, left_of, rows_of, indices, order, *planes_of in zip(
                images, budgets, counts, left or [None] * len(images), *arrays, strict=True
            )
        ]

    def splice(
        self, embeds: Sequence[Floats], prompts: Sequence[Prompt], kept: Sequence[Sequence[KeptTokens]]
    ) -> Request:
        """Prompts with the kept rows of their images, ready for the language model; `embeds` as from `embed`."""
        spliced = splice(
            embeds,
            [prompt.ids for prompt in prompts],
            kept,
            image_token_id=self.manifest.image_token_id,
            positions=self.manifest.positions,
            axes=self._axes,
        )
        return Request(prompts, kept, spliced)

    def prefill(
        self, backend: Backend, request: Request, sampling: Sampling
    ) -> tuple[Iterator[list[Piece]], int]:
        """Let a language model read the prompts; its answers, to `step` by, and the most tokens that each may have.

        That is what `sampling` says, or what the context leaves room for; `ResPruneError` where it leaves none.
        """
        room = request.spliced.room(self.manifest.context_length)
        if room < sampling.max_new_tokens:
            sampling = replace(sampling, max_new_tokens=room)
        return backend.start(request, sampling), sampling.max_new_tokens

    def _batches(self, count: int) -> list[tuple[int, int]]:
        """Which images go through a graph together."""
        most = self.preprocessor.max_batch or count
        return [(start, min(start + most, count)) for start in range(0, count, most)]


def step(answers: Iterator[list[Piece]]) -> list[Piece] | None:
    """What each answer gains by one more step of the language model, one entry a prompt; None: all have ended."""
    return next(answers, None)


def pad_rows(rows: Sequence[Floats]) -> tuple[Floats, Bools]:
    """B arrays [M_i, D] → [B, M, D] float32 with zeros behind, M at least 1, and the mask [B, M] bool of the rows."""
    if len(rows) == 1 and len(rows[0]):
        return np.ascontiguousarray(rows[0], np.float32)[None], np.ones((1, len(rows[0])), dtype=bool)
    longest = max(1, *(len(row) for row in rows))
    padded = np.zeros((len(rows), longest, rows[0].shape[1]), np.float32)
    mask = np.zeros((len(rows), longest), dtype=bool)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
        mask[index, : len(row)] = True
    return padded, mask


def _whole(encoded: Encoded) -> KeptTokens:
    """Every token: the unpruned prompt, of a bundle that has the encoder apart."""
    tokens = encoded.tokens
    return keep_all(encoded.image, tokens.rows, tokens.planes, tokens.left)


def _padded(
    rows: Sequence[npt.NDArray[Any] | None], images: Sequence[PreparedImage], fill: Any
) -> npt.NDArray[Any]:
    """What is said of each token of the images, [B, N]; `fill` behind them, and where nothing is said."""
    padded = np.full((len(images), max(image.num_tokens for image in images)), fill)
    for row, said in zip(padded, rows, strict=True):
        if said is not None:
            row[: len(said)] = said
    return padded
