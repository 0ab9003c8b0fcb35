"""The one walk from images to logits: prepare, encode, embed, select, splice; then a decoder prefills and steps.

The pipeline, the evaluation and the benchmarks all take it, and differ in what they put between two stages. The
PyTorch oracle of the exporter is the only second implementation.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from resprune.names import KEPT_PLANES, PLANE_FEATURES
from resprune.runtime.backends.backend import Embedding
from resprune.runtime.backends.session import GraphRunner
from resprune.runtime.bundle.files import Bundle
from resprune.runtime.bundle.manifest import Manifest
from resprune.runtime.errors import ResPruneError, shown
from resprune.runtime.families.preprocessor import PreparedImage, Preprocessor
from resprune.runtime.families.table import family_of
from resprune.runtime.prompt.prompter import Prompt
from resprune.runtime.prompt.splice import Bools, Floats, KeptTokens, Spliced, cut_picks, keep_all, splice

SPLIT = ("vision_encoder", "token_select")
CANDIDATES = "token_mask"
"""Input of `token_select`: the tokens that can be picked, [B, N]; output of a vision tower that selects itself."""


@dataclass(frozen=True)
class Features:
    """All tokens of one image: the main plane `rows` [N, D] float32, and its further `planes`, each [N, D].

    `left` [N] bool are the tokens that a selection inside the vision tower left, the others' rows being zeros; None if
    there was none.
    """

    rows: Floats
    planes: tuple[Floats, ...] = ()
    left: Bools | None = None


@dataclass(frozen=True)
class Encoded:
    """Images that are ready to be selected from.

    `features[i]` are all tokens of image i where the bundle can encode it apart from a question; None where the fused
    graph encodes and selects at once.
    """

    images: Sequence[PreparedImage]
    features: Sequence[Features] | None

    @staticmethod
    def joined(parts: Sequence["Encoded"]) -> "Encoded":
        """The images of several, in order; with features if all have them."""
        images = [image for part in parts for image in part.images]
        if any(part.features is None for part in parts):
            return Encoded(images, None)
        return Encoded(images, [features for part in parts for features in part.features or ()])

    def apart(self) -> "list[Encoded]":
        """Each image alone, in order."""
        features = [None] * len(self.images) if self.features is None else [[one] for one in self.features]
        return [Encoded([image], one) for image, one in zip(self.images, features, strict=True)]

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        pixels = sum(array.nbytes for image in self.images for array in image.arrays.values())
        features = self.features or ()
        arrays = (array for one in features for array in (one.rows, *one.planes, one.left))
        return pixels + sum(array.nbytes for array in arrays if array is not None)


class Walk:
    """The stages of one bundle. It keeps nothing of a question: any number of threads may use it at once."""

    def __init__(self, bundle: Bundle, graphs: GraphRunner) -> None:
        self.manifest: Manifest = bundle.manifest
        family = family_of(bundle)
        self.preprocessor: Preprocessor = family.preprocessor(bundle)
        self._axes = (family.position_axes,) if family.position_axes > 1 else ()
        self._graphs = graphs
        encoder = self.manifest.graphs.get("vision_encoder") or self.manifest.graphs.get("vision_select")
        names = {tensor.name for tensor in encoder.outputs} if encoder else set()
        self._early = self.manifest.early is not None
        self._planes = sum(name.startswith(PLANE_FEATURES.format("")) for name in names)
        self.embed_tokens = Embedding(graphs)

    @property
    def splits(self) -> bool:
        """Whether the bundle has the encoder and the selector apart (`resprune export --split`)."""
        return self.manifest.graphs.keys() >= {*SPLIT}

    @property
    def vision_graphs(self) -> tuple[str, ...]:
        """The graphs from pixels to kept tokens: a split bundle's fused one, a second tower in memory, is not run."""
        return SPLIT if self.splits else ("vision_select",)

    def encode(self, images: Sequence[PreparedImage]) -> Encoded:
        """Encode images, if the bundle has the encoder apart; else only hold them, with `features` None."""
        if not self.splits:
            return Encoded(images, None)
        outputs = ["image_features", *map(PLANE_FEATURES.format, range(self._planes))]
        outputs += [CANDIDATES] * self._early
        features: list[Features] = []
        for start, stop in self._batches(len(images)):
            batch = images[start:stop]
            arrays = self._graphs.run("vision_encoder", self.preprocessor.batch(batch), outputs)
            masks = arrays.pop() if self._early else [None] * len(batch)
            for image, mask, *planes in zip(batch, masks, *arrays, strict=True):
                rows, *further = (plane[: image.num_tokens] for plane in planes)
                left = None if mask is None else mask[: image.num_tokens]
                features.append(Features(rows, tuple(further), left))
        return Encoded(images, features)

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
        self, encoded: Encoded, text: Sequence[Floats], tokens: Sequence[int | None]
    ) -> list[KeptTokens]:
        """The tokens of each image that its question keeps.

        `text[i]` [M_i, D] float32 are the embeddings of the keywords asked about image i, M_i may be 0; `tokens[i]` is
        how many are kept of it (see `budgets`).
        """
        if not encoded.images:
            return []
        if encoded.features is None:
            encoded = self.encode(encoded.images)
        budgets = self.budgets(encoded.images, tokens)
        whole = [budget > self.manifest.selection.k for budget in budgets]
        if all(whole):
            return self._keep_whole(encoded)
        kept: list[KeptTokens] = []
        if any(whole):  # only some go through the selector
            for image, words, wanted in zip(encoded.apart(), text, budgets, strict=True):
                kept += self.select(image, [words], [wanted])
            return kept
        for start, stop in self._batches(len(encoded.images)):
            of_batch = slice(start, stop)
            kept += self._select_batch(
                encoded.images[of_batch],
                None if encoded.features is None else encoded.features[of_batch],
                text[of_batch],
                budgets[of_batch],
            )
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

    def _keep_whole(self, encoded: Encoded) -> list[KeptTokens]:
        """Every token of each image: the unpruned prompt, of a bundle that has the encoder apart."""
        return [
            keep_all(image, one.rows, one.planes, one.left)
            for image, one in zip(encoded.images, encoded.features or (), strict=True)
        ]

    def _select_batch(
        self,
        images: Sequence[PreparedImage],
        features: Sequence[Features] | None,
        text: Sequence[Floats],
        budgets: Sequence[int],
    ) -> list[KeptTokens]:
        text_embeds, text_mask = pad_rows(text)
        feeds: dict[str, npt.NDArray[Any]] = {"text_embeds": text_embeds, "text_mask": text_mask}
        if features is None:
            graph, rows, planes = "vision_select", "image_features", PLANE_FEATURES
            feeds |= self.preprocessor.batch(images)
        else:
            graph, rows, planes = "token_select", "kept_features", KEPT_PLANES
            feeds["image_features"], mask = pad_rows([one.rows for one in features])
            for row, one in zip(mask, features, strict=True):
                if one.left is not None:
                    row[: len(one.left)] &= one.left
            feeds[CANDIDATES] = mask
            for plane in range(self._planes):
                feeds[PLANE_FEATURES.format(plane)], _ = pad_rows([one.planes[plane] for one in features])
        inputs = {tensor.name: tensor for tensor in self.manifest.graphs[graph].inputs}
        if "protected_mask" in inputs:
            feeds["protected_mask"] = _protected(images)
        outputs = [rows, "kept_indices", "pick_order", *map(planes.format, range(self._planes))]
        proportional = self.manifest.attention == "proportional"
        if proportional:
            feeds["num_kept"] = np.array(budgets, np.int64)
            outputs.append("kept_counts")
        if self._early and features is None:
            outputs.append(CANDIDATES)
        arrays = self._graphs.run(graph, feeds, outputs)
        left: Sequence[Bools | None] = [None] * len(images)
        if features is not None:
            left = [one.left for one in features]
        elif self._early:
            left = [mask[: one.num_tokens] for mask, one in zip(arrays.pop(), images, strict=True)]
        counts = arrays.pop() if proportional else [None] * len(images)
        return [
            cut_picks(image, rows_of, indices, order, budget, counts_of, planes_of, left_of)
            for image, budget, counts_of, left_of, rows_of, indices, order, *planes_of in zip(
                images, budgets, counts, left, *arrays, strict=True
            )
        ]

    def splice(
        self, embeds: Sequence[Floats], prompts: Sequence[Prompt], kept: Sequence[Sequence[KeptTokens]]
    ) -> Spliced:
        """Prompts with the kept rows of their images, ready for the decoder."""
        return splice(
            embeds,
            [prompt.ids for prompt in prompts],
            kept,
            image_token_id=self.manifest.image_token_id,
            positions=self.manifest.positions,
            axes=self._axes,
        )

    def _batches(self, count: int) -> list[tuple[int, int]]:
        """Which images go through a graph together."""
        step = self.preprocessor.max_batch or count
        return [(start, min(start + step, count)) for start in range(0, count, step)]


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


def _protected(images: Sequence[PreparedImage]) -> Bools:
    """`protected_mask` [B, N] for images of up to N tokens."""
    mask = np.zeros((len(images), max(image.num_tokens for image in images)), dtype=bool)
    for index, image in enumerate(images):
        if image.protected is not None:
            mask[index, : image.num_tokens] = image.protected
    return mask
