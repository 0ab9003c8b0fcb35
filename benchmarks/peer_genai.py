"""onnxruntime-genai on a language model: `python -m benchmarks.peer_genai SPEC` prints JSON, as `stages` does."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import onnxruntime_genai as og

from benchmarks.measure import THREADS, Samples, peak_megabytes, reset_peak


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """`spec`: `model`, `lengths` (tokens of the prompt by case), `repeats`, `steps`."""
    config = og.Config(spec["model"])
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": THREADS}}}}))
    model = og.Model(config)
    rng = np.random.default_rng(0)
    samples = Samples()
    memory: dict[str, float] = {}
    lengths = sorted(spec["lengths"].items(), key=lambda case: case[1])
    for turn in range(spec["repeats"] + 1):
        for case, length in lengths if turn else lengths[:1]:
            clock = Samples() if turn == 0 else samples
            reset_peak()
            parameters = og.GeneratorParams(model)
            parameters.set_search_options(
                max_length=length + spec["steps"] + 1, min_length=length + spec["steps"] + 1, do_sample=False
            )
            generator = og.Generator(model, parameters)
            with clock.time("prefill", case):
                generator.append_tokens(rng.integers(1000, 20000, length).astype(np.int32))
                generator.generate_next_token()
            with clock.time("decode", case):
                for _ in range(spec["steps"]):
                    generator.generate_next_token()
            memory[case] = peak_megabytes()
    return {
        "samples": samples.values,
        "steps": spec["steps"],
        "memory": memory,
        "prompt tokens": spec["lengths"],
        "versions": {"onnxruntime-genai": og.__version__},
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
