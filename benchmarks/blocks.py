"""What a packed product costs by block size and accuracy level: opening it, a step and a prefill."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper
from onnx.numpy_helper import from_array

from resprune.exporter.trace.quantize import ACCURACY_LEVEL
from resprune.runtime.backends.providers import CPU, new_session
from resprune.runtime.backends.session import session_settings
from resprune.runtime.bundle.precisions import BLOCK, BLOCK_SIZES

LAYER = (2048, 11008)
"""K and N of an MLP's first product in Qwen2.5-VL-3B."""
ROWS = 128
LEVELS = (ACCURACY_LEVEL, 1)
"""The input rounded to int8 a block at a time, and float32."""
REPEATS, LEAST = 31, 500.0
"""Calls, and the milliseconds that they should take together."""


def run(work: Path, layer: tuple[int, int] = LAYER) -> dict[str, Any]:
    """Every block size with every level, 4 bits with zero points, on one thread: the least processor time of some."""
    figures = {}
    path = str(work / "product.onnx")
    for size in BLOCK_SIZES:
        for level in LEVELS:
            Path(path).write_bytes(product(*layer, size, level))
            figures[f"blocks of {size}, level {level}"] = {"file": Path(path).stat().st_size} | _times(
                path, layer[0]
            )
    Path(path).unlink()
    return figures


def _times(path: str, K: int) -> dict[str, float]:
    def opened() -> Any:
        return new_session(path, session_settings(1), [CPU])

    session = opened()
    one, many = ({"rows": np.ones((rows, K), np.float32)} for rows in (1, ROWS))
    return {
        "opening": _least(opened),
        "step": _least(lambda: session.run(None, one)),
        "prefill": _least(lambda: session.run(None, many)),
    }


def product(K: int, N: int, size: int, level: int) -> bytes:
    """An ONNX model: rows [M, K] by a random weight [N, K] in 4 bits → [M, N]."""
    rng, count = np.random.default_rng(0), -(-K // size)
    parts = {
        "numbers": rng.integers(0, 256, (N, count, size // 2), dtype=np.uint8),
        "scales": rng.random((N, count), dtype=np.float32),
        "zeros": rng.integers(0, 256, (N, -(-count // 2)), dtype=np.uint8),
    }
    attributes = {"K": K, "N": N, "bits": 4, "block_size": size, "accuracy_level": level}
    node = helper.make_node("MatMulNBits", ["rows", *parts], ["out"], domain="com.microsoft", **attributes)
    rows, out = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["M", width])
        for name, width in (("rows", K), ("out", N))
    )
    graph = helper.make_graph(
        [node], "product", [rows], [out], [from_array(array, name) for name, array in parts.items()]
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    content: bytes = model.SerializeToString()
    return content


def _least(call: Callable[[], object]) -> float:
    """Milliseconds of processor time; other work on the machine adds to it and never takes away."""
    found: list[float] = []
    while len(found) < REPEATS or sum(found) < LEAST:
        start = time.process_time()
        call()
        found.append(1e3 * (time.process_time() - start))
    return min(found)


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    base = result[f"blocks of {BLOCK}, level {ACCURACY_LEVEL}"]
    lines = [
        f"One product by a weight of {LAYER[0]:,} × {LAYER[1]:,} in 4 bits on one thread, the least processor time of "
        f"{REPEATS} calls or more; a prefill has {ROWS} rows. Level 4 rounds the rows to 8 bits, level 1 does not.\n",
        "| | weights | opening | step | prefill |",
        "|---" * 5 + "|",
    ]
    for name, found in result.items():
        times = (
            f"{found[what]:.2f} ms ({found[what] / base[what]:.2f} ×)"
            for what in ("opening", "step", "prefill")
        )
        lines.append(f"| {name} | {found['file'] / 1e6:.1f} MB | {' | '.join(times)} |")
    return "\n".join(lines)
