"""The runtime's decoder by itself, for `bursts`: `python -m benchmarks.decoder SPEC`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from benchmarks.bursts import serve
from benchmarks.measure import THREADS
from resprune.runtime.backends.backend import Embedding
from resprune.runtime.backends.onnxruntime import onnxruntime_decoder
from resprune.runtime.backends.session import OrtGraphs, SessionOptions
from resprune.runtime.bundle.files import read_bundle
from resprune.runtime.prompt.splice import Spliced


def main(spec: dict[str, Any]) -> None:
    """`spec`: `bundle`. The prompts are random embeddings."""
    bundle = read_bundle(Path(spec["bundle"]), check_hashes=False)
    options = SessionOptions(threads=THREADS)
    decoder = onnxruntime_decoder(bundle, Embedding(OrtGraphs(bundle, options)), options)
    (embeds,) = bundle.manifest.graphs["embed_tokens"].outputs
    rng = np.random.default_rng(0)

    def begin(length: int) -> Callable[[], None]:
        prompt = rng.standard_normal((1, length, embeds.shape[-1]), dtype=np.float32)
        ones = np.ones((1, length), np.int64)
        sequence = decoder.start(Spliced(prompt, np.arange(length)[None], ones))

        def step() -> None:
            sequence.step(sequence.logits.argmax(axis=1))

        return step

    serve({"onnxruntime": ort.__version__}, begin)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
