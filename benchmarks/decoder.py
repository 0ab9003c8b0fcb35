"""The runtime's decoder by itself: `python -m benchmarks.decoder SPEC` times it and prints JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from benchmarks.measure import THREADS, Samples, peak_megabytes, reset_peak
from resprune.runtime.bundle import read_bundle
from resprune.runtime.language_model import Embedding, OrtLanguageModel
from resprune.runtime.session import OrtGraphs, SessionOptions


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """`spec`: `bundle`, `lengths` (tokens of the prompt by case), `prompts` of each, `tokens` to decode after each.

    The prompts are random embeddings; the shortest goes ahead once, to warm up.
    """
    bundle = read_bundle(Path(spec["bundle"]), check_hashes=False)
    options = SessionOptions(threads=THREADS)
    model = OrtLanguageModel(bundle, Embedding(OrtGraphs(bundle, options)), options)
    (embeds,) = bundle.manifest.graphs["embed_tokens"].outputs
    rng = np.random.default_rng(0)
    samples, warm_up = Samples(), Samples()
    memory: dict[str, float] = {}
    lengths = sorted(spec["lengths"].items(), key=lambda case: case[1])
    runs = [(warm_up, *lengths[0]), *((samples, *case) for case in lengths for _ in range(spec["prompts"]))]
    for clock, case, length in runs:
        reset_peak()
        prompt = rng.standard_normal((1, length, embeds.shape[-1]), dtype=np.float32)
        logits = model.prefill(prompt, np.arange(length)[None], np.ones((1, length), np.int64))
        with clock.time("decode", case):
            for _ in range(spec["tokens"]):
                logits = model.step(logits.argmax(axis=1))
        memory[case] = peak_megabytes()
    return {
        "samples": samples.values,
        "prompts": spec["prompts"],
        "tokens": spec["tokens"],
        "memory": memory,
        "versions": {"onnxruntime": ort.__version__},
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
