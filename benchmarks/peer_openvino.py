"""OpenVINO GenAI and its CDPruner, in an environment of its own: `python -m benchmarks.peer_openvino SPEC` prints JSON.

The stages are what its perf metrics tell: `prepare` is tokenizing, encoding and pruning, the rest of the first token is
the language model. Its pruner has no figure of its own; it is what `prepare` takes more than unpruned.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai
from PIL import Image

from benchmarks.measure import THREADS, Samples, peak_mebibytes, reset_peak


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """`spec`: `model`, `precision` (f32, bf16), `ratios` (percent by case), `picture`, `question`, and the rest."""
    pipeline = openvino_genai.VLMPipeline(
        spec["model"],
        "CPU",
        INFERENCE_NUM_THREADS=THREADS,
        INFERENCE_PRECISION_HINT=spec["precision"],
    )
    samples = Samples()
    tokens: dict[str, int] = {}
    memory: dict[str, float] = {}
    ratios = sorted(spec["ratios"].items(), key=lambda case: -case[1])  # the smallest prompt first
    for turn in range(spec["repeats"] + 1):
        for case, ratio in ratios if turn else ratios[:1]:
            reset_peak()
            clock = Samples() if turn == 0 else samples
            with clock.time("pixels", case):
                array = np.array(Image.open(spec["picture"]).convert("RGB"))[None]
                # Warmed up with another picture: of a prompt that it knows it has the KV cache.
                pixels = ov.Tensor(array if turn else 255 - array)
            config = openvino_genai.GenerationConfig(max_new_tokens=spec["steps"] + 1, ignore_eos=True)
            config.pruning_ratio = ratio
            metrics = pipeline.generate(
                spec["question"], images=[pixels], generation_config=config
            ).perf_metrics
            first, prepare = metrics.get_ttft().mean, metrics.get_prepare_embeddings_duration().mean
            figures = {
                "prepare": prepare,
                "prefill": first - prepare,
                "decode": metrics.get_tpot().mean * spec["steps"],
            }
            clock.add({case: {stage: [value] for stage, value in figures.items()}})
            memory[case] = peak_mebibytes()
            tokens[case] = metrics.get_num_input_tokens()
    return {
        "samples": samples.values,
        "steps": spec["steps"],
        "memory": memory,
        "prompt tokens": tokens,
        "versions": {"openvino-genai": openvino_genai.__version__.split("-")[0]},
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
