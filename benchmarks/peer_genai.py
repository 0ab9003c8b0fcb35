"""onnxruntime-genai on a language model, for `bursts`: `python -m benchmarks.peer_genai SPEC`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime_genai as og

from benchmarks.bursts import serve
from benchmarks.measure import THREADS


def main(spec: dict[str, Any]) -> None:
    """`spec`: `model`, and `tokens` that there is to be room for after a prompt. The prompts are random ids."""
    config = og.Config(spec["model"])
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": THREADS}}}}))
    model = og.Model(config)
    rng = np.random.default_rng(0)

    def begin(length: int) -> Callable[[], object]:
        longest = length + spec["tokens"] + 1
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=longest, min_length=longest, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens(rng.integers(1000, 20000, length).astype(np.int32))
        generator.generate_next_token()
        return generator.generate_next_token

    serve({"onnxruntime-genai": og.__version__}, begin)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
