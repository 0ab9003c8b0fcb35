"""Every weight of a written graph against the checkpoint's, from the file alone and not by its writer.

A weight that was cast or transposed must be the checkpoint's bit for bit; a quantized one no further from it than
rounding takes it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnx
import torch
from torch import Tensor

from resprune.exporter.shards import StoredTensor
from resprune.exporter.weights import one_thread

TRANSPOSED = ".T"
SCALES = "_scales"
DTYPES: dict[int, torch.dtype] = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.UINT8: torch.uint8,
}
ROWS = 512
SLACK = 1e-3
"""Of a quantization step: what float32 may make of a number that lies between two steps."""


def compare_weights(
    graph: Path, stored: Mapping[str, StoredTensor], progress: Callable[[int], object] = lambda count: None
) -> tuple[list[str], int]:
    """Names of the weights in `graph` that are not the checkpoint's, and how many weights there are.

    `progress(count)` is called as `count` more bytes have been compared.
    """
    model = onnx.load(graph, load_external_data=False)
    written = {
        tensor.name: _place(tensor, graph.parent)
        for tensor in model.graph.initializer
        if tensor.external_data
    }

    def compare(name: str) -> bool:
        place = written[name]
        equal = place.offset + place.nbytes <= place.file.stat().st_size and _same(name, written, stored)
        progress(place.nbytes)
        return equal

    # The last written first, for the system may still have them in memory. Comparing releases the interpreter's lock;
    # each thread holds one weight mapped.
    names = list(reversed(written))
    with one_thread(), ThreadPoolExecutor(os.cpu_count()) as threads:
        equal = list(threads.map(compare, names))
    return [name for name, same in zip(names, equal, strict=True) if not same], len(names)


def _place(tensor: onnx.TensorProto, folder: Path) -> StoredTensor:
    place = {entry.key: entry.value for entry in tensor.external_data}
    return StoredTensor(
        folder / place["location"],
        DTYPES[tensor.data_type],
        tuple(tensor.dims),
        int(place["offset"]),
        int(place["length"]),
    )


def _same(name: str, written: Mapping[str, StoredTensor], stored: Mapping[str, StoredTensor]) -> bool:
    parameter, _, part = name.rpartition(".")
    if part.endswith(SCALES):
        return name.removesuffix(SCALES) in written  # with which they are compared
    if part in ROUNDED:
        if parameter not in stored:
            return False
        scales, weight = written[name + SCALES].read(), stored[parameter].read()
        return ROUNDED[part](written[name].read(), scales, weight)
    source = stored.get(name.removesuffix(TRANSPOSED))
    return source is not None and _equal(written[name], source, name.endswith(TRANSPOSED))


def _equal(written: StoredTensor, source: StoredTensor, transposed: bool) -> bool:
    """Bit for bit, a few rows of the checkpoint's at a time."""
    ours, theirs = written.read(), source.read()
    if ours.shape != (theirs.shape[::-1] if transposed else theirs.shape):
        return False
    if not transposed:
        ours = ours.reshape(*theirs.shape[:1], -1)
    theirs = theirs.reshape(*theirs.shape[:1], -1)
    return all(
        torch.equal(
            # PyTorch is quick to transpose a matrix, and slow with a part of one.
            _bits(ours[:, rows].contiguous().t().contiguous() if transposed else ours[rows]),
            _bits(theirs[rows].to(written.dtype)),
        )
        for rows in _rows(len(theirs))
    )


def _bits(tensor: Tensor) -> Tensor:
    """As integers, so that a NaN equals itself, and a zero not its negative."""
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize])


def _int8_rounded(numbers: Tensor, scales: Tensor, weight: Tensor) -> bool:
    """Numbers [K, N] int8, a scale for each of N, weight [N, K]."""
    return all(
        _within(numbers[:, rows].t().float(), scales[rows, None], weight[rows])
        for rows in _rows(weight.shape[0])
    )


def _int4_rounded(numbers: Tensor, scales: Tensor, weight: Tensor) -> bool:
    """Numbers [N, blocks, 16] uint8, the first of two in the low bits, eight being zero; scales [N, blocks]."""
    return all(
        _within(
            torch.stack([numbers[rows] & 15, numbers[rows] >> 4], dim=-1).flatten(1).float() - 8,
            scales[rows].repeat_interleave(2 * numbers.shape[2], dim=1),
            torch.nn.functional.pad(weight[rows].float(), (0, -weight.shape[1] % (2 * numbers.shape[2]))),
            clipped=7,
        )
        for rows in _rows(weight.shape[0])
    )


def _rows(count: int) -> list[slice]:
    return [slice(start, start + ROWS) for start in range(0, count, ROWS)]


def _within(numbers: Tensor, scales: Tensor, weight: Tensor, clipped: int | None = None) -> bool:
    """Whether all numbers stand for the weight to within half a step, or a whole one where they were `clipped`."""
    steps = torch.where(numbers == clipped, 1.0, 0.5) if clipped is not None else 0.5
    return bool(((numbers * scales - weight.float()).abs() <= (steps + SLACK) * scales.abs()).all())


ROUNDED: dict[str, Callable[[Tensor, Tensor, Tensor], bool]] = {"int8": _int8_rounded, "q4": _int4_rounded}
