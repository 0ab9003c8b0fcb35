"""The vision half of a bundle: pictures and the question's tokens in, kept visual tokens out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from resprune.runtime.backends.session import GraphRunner
from resprune.runtime.bundle.files import Bundle
from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.picture import Picture, Preprocessor
from resprune.runtime.prompt.splice import Floats, KeptTokens, cut_picks


@dataclass(frozen=True)
class Looked:
    """Pictures that have been looked at.

    `image_features[i]` [N_i, D] float32 are all tokens of picture i if the bundle could encode it apart from a
    question; else None.
    """

    pictures: Sequence[Picture]
    image_features: Sequence[Floats] | None


class Vision:
    """A family's way from pictures to kept tokens through the bundle's graphs."""

    def __init__(self, bundle: Bundle, preprocessor: Preprocessor, graphs: GraphRunner) -> None:
        self._bundle = bundle
        self._preprocessor = preprocessor
        self._graphs = graphs

    def look(self, pictures: Sequence[Picture]) -> Looked:
        """Encode the pictures, if the bundle has the encoder and the selector apart."""
        if not {"vision_encoder", "token_select"} <= self._bundle.manifest.graphs.keys():
            return Looked(pictures, None)
        features: list[Floats] = []
        for start, stop in self._runs(len(pictures)):
            together = pictures[start:stop]
            (rows,) = self._graphs.run(
                "vision_encoder", self._preprocessor.batch(together), ["image_features"]
            )
            features += [row[: picture.num_tokens] for row, picture in zip(rows, together, strict=True)]
        return Looked(pictures, features)

    def select(self, looked: Looked, text: Sequence[Floats], tokens: int | None) -> list[KeptTokens]:
        """The tokens of each picture that its question keeps.

        `text[i]` [M_i, D] float32 are the embeddings of the nouns asked about picture i, M_i may be 0; `tokens` is how
        many are kept, None for what the bundle was exported to keep. `ResPruneError` for `tokens` below 1 or above K.
        """
        selection = self._bundle.manifest.selection
        proportional = self._bundle.manifest.attention == "proportional"
        if tokens is not None and not 1 <= tokens <= selection.k:
            raise ResPruneError(
                f"this bundle keeps {selection.k} tokens of a picture, so tokens should be 1 to {selection.k}, "
                f"not {tokens}; export with a larger -k for more"
            )
        kept: list[KeptTokens] = []
        for start, stop in self._runs(len(looked.pictures)):
            pictures = looked.pictures[start:stop]
            budgets = [
                selection.budget(picture.num_tokens) if tokens is None else tokens for picture in pictures
            ]
            text_embeds, text_mask = pad_rows(text[start:stop])
            feeds: dict[str, npt.NDArray[Any]] = {"text_embeds": text_embeds, "text_mask": text_mask}
            if looked.image_features is None:
                graph, rows = "vision_select", "image_features"
                feeds |= self._preprocessor.batch(pictures)
            else:
                graph, rows = "token_select", "kept_features"
                feeds["image_features"], feeds["token_mask"] = pad_rows(looked.image_features[start:stop])
            outputs = [rows, "kept_indices", "pick_order"]
            if proportional:
                feeds["num_kept"] = np.array(budgets, np.int64)
                outputs.append("kept_counts")
            arrays = self._graphs.run(graph, feeds, outputs)
            for picture, budget, *of_picture in zip(pictures, budgets, *arrays, strict=True):
                features, indices, order, *counts = of_picture
                kept.append(
                    cut_picks(features, indices, order, budget, picture.offsets, picture.advance, *counts)
                )
        return kept

    def _runs(self, count: int) -> list[tuple[int, int]]:
        """Which pictures go through a graph together."""
        step = self._preprocessor.pictures_a_run or count
        return [(start, min(start + step, count)) for start in range(0, count, step)]


def pad_rows(rows: Sequence[Floats]) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Lists of rows [M_i, D] → [B, M, D], M at least 1, and the mask [B, M] that leaves the filling out."""
    longest = max(1, *(len(row) for row in rows))
    padded = np.zeros((len(rows), longest, rows[0].shape[1]), np.float32)
    mask = np.zeros((len(rows), longest), dtype=bool)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
        mask[index, : len(row)] = True
    return padded, mask
