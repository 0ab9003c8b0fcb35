"""A language model behind a bundle by itself, for `bursts`: `python -m benchmarks.decoder SPEC`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bursts import serve
from benchmarks.measure import THREADS
from resprune.runtime.backends.backend import BackendFactory, Embedding, Request
from resprune.runtime.backends.llama_cpp import llamacpp
from resprune.runtime.backends.onnxruntime import onnxruntime_backend
from resprune.runtime.backends.session import OrtGraphs, SessionOptions
from resprune.runtime.bundle.files import read_bundle
from resprune.runtime.prompt.prompter import Prompter
from resprune.runtime.prompt.splice import KeptTokens, Picks, Spliced
from resprune.runtime.sampling import Sampling


def main(spec: dict[str, Any]) -> None:
    """`spec`: `bundle`, `question`, and `tokens` that there is to be room for after a prompt.

    With `gguf`, llama.cpp answers from that file in place of the bundle's decoder, and `packages` is the folder that
    has its Python part. A prompt is the question about an image, of random rows.
    """
    bundle = read_bundle(Path(spec["bundle"]), check_hashes=False)
    options = SessionOptions(threads=THREADS)
    engine = "onnxruntime"
    factory: BackendFactory = onnxruntime_backend
    if "gguf" in spec:
        sys.path.append(spec["packages"])
        engine, factory = "llama-cpp-python", llamacpp(spec["gguf"])
    backend = factory(bundle, Embedding(OrtGraphs(bundle, options)), options)
    prompt = Prompter(bundle).prompt(spec["question"], 1)
    width = bundle.graph("embed_tokens").outputs[0].shape[-1]
    sampling = Sampling(max_new_tokens=spec["tokens"] + 1, min_new_tokens=spec["tokens"] + 1)
    rng = np.random.default_rng(0)

    def begin(length: int) -> Callable[[], object]:
        rows = rng.standard_normal((1, length, width), dtype=np.float32)
        kept = np.arange(length + 1 - len(prompt.ids))
        picks = Picks(kept, kept, np.ones_like(kept))
        image = KeptTokens(rows[0, kept], picks, kept, (len(kept),), (len(kept),))
        spliced = Spliced(rows, np.arange(length)[None], np.ones((1, length), np.int64))
        answer = backend.start(Request([prompt], [[image]], spliced), sampling)
        next(answer)  # the prefill's own token
        return lambda: next(answer)

    serve({engine: version(engine)}, begin)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
