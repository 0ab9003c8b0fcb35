"""A language model in OpenVINO, in an environment of its own: `python -m benchmarks.peer_openvino_text SPEC`.

Writes the logits of texts, as `precision.text_logits` returns them.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import openvino as ov


def write_logits(spec: dict[str, Any]) -> None:
    """`spec`: `model`, `precision` (f32, bf16), `texts` (token ids of each), `out`, a file [S, vocabulary]."""
    settings = {"INFERENCE_PRECISION_HINT": spec["precision"]}
    compiled = ov.Core().compile_model(f"{spec['model']}/openvino_model.xml", "CPU", settings)
    request = compiled.create_infer_request()
    logits = []
    for ids in spec["texts"]:
        request.reset_state()
        feeds = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "position_ids": np.arange(len(ids))[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        request.infer(feeds)
        logits.append(np.array(request.get_tensor("logits").data[0, :-1], np.float32))
    np.save(spec["out"], np.concatenate(logits))


if __name__ == "__main__":
    write_logits(json.loads(sys.argv[1]))
