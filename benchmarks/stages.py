"""The runtime's own stages, one by one: `python -m benchmarks.stages SPEC` times them and prints JSON.

It imports neither torch nor the exporter, so that it runs as well beside another build of ONNX Runtime.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime as ort

from benchmarks.measure import THREADS, sample_stages
from resprune.elements import ELEMENTS
from resprune.names import DECODER
from resprune.runtime.backends.backend import Embedding, LocalBackend, Piece
from resprune.runtime.backends.onnxruntime import onnxruntime_decoder
from resprune.runtime.backends.providers import CPU
from resprune.runtime.backends.session import (
    Array,
    GraphRunner,
    OrtGraphs,
    SessionOptions,
    session_settings,
)
from resprune.runtime.bundle.files import Bundle, read_bundle
from resprune.runtime.families.image import load_image
from resprune.runtime.families.preprocessor import PreparedImage
from resprune.runtime.prompt.prompter import Prompt, Prompter
from resprune.runtime.prompt.splice import Floats, KeptTokens, keep_all
from resprune.runtime.sampling import Sampling
from resprune.runtime.walk import Encoded, Walk, step


class Selector:
    """A `GraphRunner` whose `token_select` is a file for one K: one for a larger K runs as many picks as that."""

    def __init__(self, graphs: GraphRunner, path: str) -> None:
        settings = session_settings(THREADS)
        self.session = ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        self.open, self.close = graphs.open, graphs.close

    def run(self, graph: str, feeds: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        assert graph == "token_select"
        return list(self.session.run(list(outputs), dict(feeds)))


class Stages:
    """A split bundle, opened; the unpruned prompt goes the same way as a pruned one, without a selection.

    `selectors` are graphs' files by the K that they are for.
    """

    def __init__(
        self,
        bundle: Bundle,
        providers: Sequence[str] = (CPU,),
        selectors: Mapping[int, str] | None = None,
    ) -> None:
        options = SessionOptions(providers, THREADS)
        self.manifest = bundle.manifest
        self.prompter = Prompter(bundle)
        graphs = OrtGraphs(bundle, options)
        embedding = Embedding(graphs)
        self.walk = Walk(bundle, graphs, embedding)
        # No token ends an answer: there are as many steps as are asked for.
        decoder = onnxruntime_decoder(bundle, embedding, options)
        self.backend = LocalBackend(decoder, frozenset(), bundle.manifest.image_token_id)
        self.selecting = {
            k: Walk(of_budget(bundle, k), Selector(graphs, path), embedding)
            for k, path in (selectors or {}).items()
        }
        self.answer: Iterator[list[Piece]] = iter(())

    def pixels(self, picture: Path) -> PreparedImage:
        """The image, decoded and ready for the encoder."""
        return self.walk.preprocessor(load_image(picture))

    def encode(self, pixels: PreparedImage) -> Encoded:
        """All its tokens: the benchmarks export with --split."""
        return self.walk.encode([pixels])[0]

    def prompt(self, question: str) -> tuple[Prompt, Floats]:
        """The prompt of a question about one image, and its embeddings [S, D]."""
        prompt = self.prompter.prompt(question, 1)
        return prompt, self.walk.embed([prompt])[0]

    def select(
        self, pixels: PreparedImage, features: Encoded, prompt: tuple[Prompt, Floats], k: int | None
    ) -> KeptTokens:
        """`k` of its tokens by the selector for that K, or all of them."""
        if k is None:
            return keep_all(pixels, features.tokens.rows)
        return self.selecting[k].select([features], [self.walk.keywords(*prompt)], [k])[0]

    def prefill(self, prompt: tuple[Prompt, Floats], kept: KeptTokens) -> tuple[int, int]:
        """The length of the prompt, and the first token."""
        self.answer = iter(())  # the cache before goes before the new one is made
        request = self.walk.splice([prompt[1]], [prompt[0]], [[kept]])
        self.answer, _ = self.walk.prefill(
            self.backend, request, Sampling(max_new_tokens=self.manifest.context_length)
        )
        pieces = step(self.answer)
        assert pieces is not None
        ((token,),) = pieces
        return request.spliced.inputs_embeds.shape[1], token

    def decode(self, token: int, steps: int) -> None:
        """`steps` tokens after `token`, the first, whatever they are."""
        for _ in range(steps):
            assert step(self.answer) is not None

    def first_token(self, picture: Path, question: str, tokens: int | None) -> int:
        """Image and question to the first token, as `resprune ask` goes."""
        prompt = self.prompt(question)
        pixels = self.pixels(picture)
        if tokens is None:
            kept = keep_all(pixels, self.encode(pixels).tokens.rows)
        else:
            (kept,) = self.walk.select([Encoded(pixels)], [self.walk.keywords(*prompt)], [tokens])
        return self.prefill(prompt, kept)[1]


def of_budget(bundle: Bundle, k: int) -> Bundle:
    """The bundle as if it were exported for this K."""
    manifest = bundle.manifest
    return replace(bundle, manifest=replace(manifest, selection=replace(manifest.selection, k=k)))


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """As `sample_stages`; `spec` has `bundle`, `selectors` (a graph's path by K) and `providers` besides."""
    bundle = read_bundle(spec["bundle"], check_hashes=False)
    selectors = {int(k): path for k, path in spec["selectors"].items()}
    stages = Stages(bundle, spec.get("providers", (CPU,)), selectors)
    past = [
        tensor
        for tensor in bundle.manifest.graphs[DECODER].inputs
        if tensor.name.startswith("past_key_values")
    ]
    return {
        **sample_stages(stages, spec, selectors),
        "cache bytes a token": sum(
            ELEMENTS[tensor.dtype].nbytes * int(tensor.shape[1]) * int(tensor.shape[3]) for tensor in past
        ),
        "versions": {"onnxruntime": ort.__version__},
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
