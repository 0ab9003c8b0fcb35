"""A model whose stages run apart, so that any selection can stand between the encoder and the language model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from resprune.evaluation.selectors import stands_for
from resprune.evaluation.towers import EARLY, RESIZE, refused, smaller_image
from resprune.names import DECODER
from resprune.runtime.answer import Batch, Row
from resprune.runtime.backends.backend import Decoder, Embedding, local_backend
from resprune.runtime.backends.onnxruntime import onnxruntime_decoder
from resprune.runtime.backends.session import OrtGraphs, SessionOptions
from resprune.runtime.budget import Budget
from resprune.runtime.bundle.files import Bundle, read_bundle
from resprune.runtime.bundle.manifest import ATTENTION, ENGINES_FOLDER, POSITIONS, Manifest
from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.image import ImageSource, load_image
from resprune.runtime.families.preprocessor import PreparedImage
from resprune.runtime.families.table import FAMILIES
from resprune.runtime.generate import TextStream
from resprune.runtime.prompt.prompter import Prompt, Prompter
from resprune.runtime.prompt.splice import Floats, Ints, KeptTokens, keep
from resprune.runtime.sampling import bundle_sampling
from resprune.runtime.walk import Encoded, Walk

ROOMS = ("evaluation", "exporter", "graphs", "runtime")


@cache
def code(root: Path = Path(__file__).parents[1]) -> str:
    """SHA-256, in hexadecimal, of the sources in `root` that answers may depend on.

    Two checkouts may have one version.
    """
    digest = hashlib.sha256()
    for path in chain(sorted(root.glob("*.py")), *(sorted((root / room).rglob("*.py")) for room in ROOMS)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Asked:
    """A question as the model reads it: `embeds` [S, D] float32 of the whole prompt, `text` [M, D] of its keywords."""

    prompt: Prompt
    embeds: Floats
    text: Floats


@dataclass(frozen=True)
class Engine:
    """What runs the stages, for the record; `threads` 0 is OMP_NUM_THREADS, or one a physical core."""

    device: str
    threads: int
    versions: dict[str, str]


def engine(device: str, threads: int, *modules: Any) -> Engine:
    """An `Engine` with the versions of this package, of NumPy, and of the imported `modules`."""
    versions = {module.__name__: module.__version__ for module in (np, *modules)}
    return Engine(device, threads, {"resprune": version("resprune")} | versions)


@dataclass(frozen=True)
class Stages:
    """What differs between a bundle and a checkpoint in PyTorch.

    `walk` prepares images, embeds and splices; `encode` takes images and their files as the family prepared them,
    `select` an image, its question's text [M, D] and K → K picks: the model's own selection.
    """

    walk: Walk
    encode: Callable[[Sequence[Image.Image], Sequence[PreparedImage]], list[Encoded]]
    select: Callable[[Encoded, Floats, int], Ints]
    decoder: Decoder
    most: int
    """The largest K that `select` takes."""
    engine: Engine
    early: Callable[[str], Callable[[Sequence[PreparedImage]], list[Encoded]]] | None = None
    """What `--early` asks for → how images are encoded so; `ResPruneError` for what the tower cannot do. None where the
    tower is what it is."""
    smaller: Callable[[PreparedImage, int], Encoded] | None = None
    """An image and K → the same image with about K tokens, for towers of one size; None as above."""


class Model:
    """A bundle or a checkpoint, ready to answer with whatever tokens it is given."""

    def __init__(self, bundle: Bundle, stages: Stages, fingerprint: str, attention: str | None) -> None:
        self.manifest = _with_attention(bundle.manifest, attention)
        self.fingerprint = fingerprint
        self.most = stages.most
        self.engine = stages.engine
        self._stages = stages
        self._prompter = Prompter(bundle)
        self._walk = stages.walk
        self._backend = local_backend(bundle, stages.decoder)
        self._greedy = replace(bundle_sampling(bundle), temperature=0)

    @property
    def num_tokens(self) -> int | None:
        """N; None where it depends on the image."""
        return self.manifest.selection.num_tokens

    @property
    def settings(self) -> dict[str, Any]:
        """What answers depend on beside the data and the tokens kept, as `Answers` compares it."""
        return {
            "model": self.fingerprint,
            "positions": self.manifest.positions,
            "attention": self.manifest.attention,
            "resprune": code(),
        }

    def look(self, sources: Sequence[ImageSource], selector: str = "", k: int | None = None) -> list[Encoded]:
        """Encode images, each with all its tokens.

        The selectors of `towers.py` change that: with "resize" an image is made smaller until it has about `k` tokens,
        with "early …" the tower selects inside. Raises `ResPruneError` where the model's tower cannot be changed.
        """
        images = [load_image(source) for source in sources]
        prepared = [self._walk.preprocessor(image) for image in images]
        if selector == RESIZE and k is not None:
            self._require_tower(selector)
            return [self._smaller(image, one, k) for image, one in zip(images, prepared, strict=True)]
        if selector.startswith(EARLY):
            return self._early(selector)(prepared)
        return self._stages.encode(images, prepared)

    def _require_tower(self, selector: str) -> None:
        """`ResPruneError` for a selector of `towers.py` that this model's tower cannot have."""
        if selector.startswith(EARLY):
            self._early(selector)
        any_size = FAMILIES[self.manifest.family].any_size
        if selector == RESIZE and not (any_size or self._stages.smaller):
            raise refused(RESIZE, "this model")

    def _early(self, selector: str) -> Callable[[Sequence[PreparedImage]], list[Encoded]]:
        if self._stages.early is None:
            raise refused(selector, "this model")
        return self._stages.early(selector.removeprefix(EARLY))

    def _smaller(self, image: Image.Image, prepared: PreparedImage, k: int) -> Encoded:
        if FAMILIES[self.manifest.family].any_size:
            image = smaller_image(image, lambda shown: self._walk.preprocessor(shown).num_tokens, k)
            (encoded,) = self._stages.encode([image], [self._walk.preprocessor(image)])
            return encoded
        assert self._stages.smaller is not None
        return self._stages.smaller(prepared, k)

    def read(
        self,
        question: str,
        expansions: Sequence[str | None] = (None,),
        *,
        about: Sequence[str] | None = None,
    ) -> Asked:
        """A question's prompt and embeddings; `about` names keywords that guide the selection in place of its nouns.

        `expansions` has an entry for each image (`PreparedImage.expansion`).
        """
        prompt = self._prompter.prompt(question, len(expansions), about=about, expansions=expansions)
        (embeds,) = self._walk.embed([prompt])
        return Asked(prompt, embeds, self._walk.keywords(prompt, embeds))

    def select(self, encoded: Encoded, asked: Asked, k: int) -> Ints:
        """The model's own choice of k tokens [k], in pick order."""
        return self._stages.select(encoded, asked.text, k)

    def answer(
        self,
        asked: Sequence[Asked],
        encoded: Sequence[Sequence[Encoded]],
        kept: Sequence[Sequence[Ints]],
        max_new_tokens: int,
    ) -> list[str]:
        """Greedy answers to B questions, prefilled as one batch.

        `encoded[b]` are the images of question b; `kept[b][i]` [K] int64 are the tokens kept of the i-th, in any order.

        What of the checkpoint's settings `generate` applies without drawing is applied here.
        """
        rows_kept = [
            [self._keep(image, order) for image, order in zip(images, orders, strict=True)]
            for images, orders in zip(encoded, kept, strict=True)
        ]
        request = self._walk.splice([one.embeds for one in asked], [one.prompt for one in asked], rows_kept)
        sampling = replace(self._greedy, max_new_tokens=max_new_tokens)
        steps, _ = self._walk.prefill(self._backend, request, sampling)
        rows = [Row(TextStream(self._prompter.tokenizer)) for _ in asked]
        Batch(steps, rows, {}).finish()
        return ["".join(row.pieces) for row in rows]

    def _keep(self, encoded: Encoded, order: Ints) -> KeptTokens:
        """The rows that stay of an image, ascending by index whatever the order they were picked in."""
        tokens, counts = encoded.tokens, None
        if self.manifest.selection.counts and len(order):
            kept, every = np.sort(order), tokens.candidates
            places = stands_for(tokens.rows[every], np.searchsorted(every, kept))
            counts = np.bincount(places, minlength=len(kept))
        return keep(encoded.image, tokens.rows, order, counts, tokens.planes, tokens.left)

    def check(self, budgets: Sequence[Budget], own: bool, selectors: Sequence[str] = ()) -> None:
        """`ResPruneError` for a budget above N, or above what the model's own selection takes if that is asked for.

        Where N varies, the largest image's counts: one that comes late should not end a run of hours. So it is for
        `selectors` that this model's tower cannot have.
        """
        for selector in selectors:
            self._require_tower(selector)
        largest = self.num_tokens or self.manifest.selection.max_tokens
        for budget in budgets:
            if budget.everything:
                continue
            if budget.k is not None and largest is not None and budget.k > largest:
                raise ResPruneError(
                    f"-k {budget} is more than the {largest} visual tokens of an image; give 1 to {largest}, or all"
                )
            wanted = budget.k if largest is None else budget.of(largest)
            if own and wanted is not None and wanted > self.most:
                share = "" if budget.k is not None else f" of {largest} tokens"
                raise ResPruneError(
                    f"-k {budget}{share} is more than the {self.most} tokens this bundle's selection keeps; "
                    "export it with a larger -k"
                )

    def close(self) -> None:
        """Free the language model."""
        self._backend.close()


def check_policies(positions: str | None, attention: str | None) -> None:
    """`ResPruneError` for a position policy or an attention that does not exist; None is either's default."""
    for what, value, known in (("positions", positions, POSITIONS), ("attention", attention, ATTENTION)):
        if value is not None and value not in known:
            raise ResPruneError(f"{what} should be {' or '.join(known)}, not {value}")


def open_bundle(
    path: str | Path, *, positions: str | None = None, attention: str | None = None, threads: int = 0
) -> Model:
    """A split bundle in ONNX Runtime; its own selection is its graph `token_select`.

    `positions` and `attention` take the place of the bundle's. Raises `ResPruneError` for a bundle that is incomplete,
    or whose encoder cannot be run apart.
    """
    import onnxruntime

    check_policies(positions, attention)
    bundle = with_positions(read_bundle(path), positions)
    bundle.graph(DECODER)  # one that was exported without is told so first
    options = SessionOptions(threads=threads)
    graphs = OrtGraphs(bundle, options)
    walk = Walk(bundle, graphs, Embedding(graphs))
    if not walk.splits:
        raise ResPruneError(f"{path} has no encoder apart from its selection; export it with --split")

    def encode(images: Sequence[Image.Image], prepared: Sequence[PreparedImage]) -> list[Encoded]:
        return walk.encode(prepared)

    def select(encoded: Encoded, text: Floats, k: int) -> Ints:
        (kept,) = walk.select([encoded], [text], [k])
        return kept.picks.pick_order

    stages = Stages(
        walk,
        encode,
        select,
        onnxruntime_decoder(bundle, walk.embed_tokens, options),
        bundle.manifest.selection.k,
        engine("cpu", threads, onnxruntime),
    )
    # Of the files alone, without what was built of them: the same checkpoint exported again is the same model.
    exported = sorted(name for name in bundle.manifest.files if not name.startswith(f"{ENGINES_FOLDER}/"))
    digests = json.dumps({name: bundle.manifest.files[name].sha256 for name in exported})
    return Model(bundle, stages, hashlib.sha256(digests.encode()).hexdigest(), attention)


def with_positions(bundle: Bundle, positions: str | None) -> Bundle:
    """The bundle under another position policy, where the family allows it."""
    manifest = bundle.manifest
    if positions is None or positions == manifest.positions:
        return bundle
    policy = FAMILIES[manifest.family].policy(positions)
    return replace(bundle, manifest=replace(manifest, positions=policy))


def _with_attention(manifest: Manifest, attention: str | None) -> Manifest:
    """The manifest with another attention: every decoder that takes counts can have them all be 1."""
    if attention is None or attention == manifest.attention:
        return manifest
    if attention != "plain":
        raise ResPruneError(
            f"the bundle was exported with --attention {manifest.attention}, and its decoder takes no counts; "
            f"export it with --attention {attention}"
        )
    return replace(manifest, selection=replace(manifest.selection, counts=False))
