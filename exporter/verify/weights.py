"""Every weight of a written graph against the checkpoint's, from the file alone and not by its writer.

A weight that was cast or transposed must be the checkpoint's bit for bit; a quantized one no further from it than
rounding takes it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from torch import Tensor

from resprune.exporter.checkpoint.shards import StoredTensor
from resprune.exporter.trace.tracer import IN_BLOCKS, INT8, PACKED, SCALES, TRANSPOSED, ZEROS

ROWS = 512
SLACK = 1e-3
"""Of a quantization step: what float32 may make of a number that lies between two steps."""


class Comparison:
    """The weights of a graph that is being written: each is compared as soon as it is in the file, in a thread.

    By then both files are in the system's memory, where they do not stay if they are larger than that.
    """

    def __init__(self, graph: Path, stored: Mapping[str, StoredTensor]) -> None:
        """`graph` itself is written already; its data need not be."""
        model = onnx.load(graph, load_external_data=False)
        self._stored = stored
        self._written = {
            tensor.name: _place(tensor, graph.parent)
            for tensor in model.graph.initializer
            if tensor.external_data
        }
        self._waiting = deque(sorted(self._written, key=lambda name: self._written[name].offset))
        # Comparing releases the interpreter's lock. PyTorch has no threads of its own here.
        self._thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
        self._equal: dict[str, Future[bool]] = {}

    def advance(self, size: int) -> None:
        """The first `size` bytes of the data are in the file."""
        while self._waiting and self._end(self._waiting[0]) <= size:
            name = self._waiting.popleft()
            self._equal[name] = self._thread.submit(_same, name, self._written, self._stored)

    def finish(self, progress: Callable[[int], object] = lambda count: None) -> tuple[list[str], int]:
        """Names of the weights that are not the checkpoint's, or not in the file, and how many weights there are.

        `progress(count)` is called as `count` more bytes have been compared.
        """
        wrong = [*self._waiting]
        for name, equal in self._equal.items():
            wrong += [] if equal.result() else [name]
            progress(self._written[name].nbytes)
        return wrong, len(self._written)

    def __enter__(self) -> Comparison:
        return self

    def __exit__(self, *raised: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _end(self, name: str) -> int:
        """Where in the file the weight ends, with the scales that it is compared with."""
        parts = [self._written[part] for part in (name, name + SCALES, name + ZEROS) if part in self._written]
        return max(place.offset + place.nbytes for place in parts)


def _place(tensor: onnx.TensorProto, folder: Path) -> StoredTensor:
    place = {entry.key: entry.value for entry in tensor.external_data}
    return StoredTensor(
        folder / place["location"],
        tensor_adapters.to_torch_dtype(ir.DataType(tensor.data_type)),
        tuple(tensor.dims),
        int(place["offset"]),
        int(place["length"]),
    )


def _same(name: str, written: Mapping[str, StoredTensor], stored: Mapping[str, StoredTensor]) -> bool:
    stem, _, part = name.rpartition(".")
    for ending in (SCALES, ZEROS):
        if part.endswith(ending):
            return name.removesuffix(ending) in written  # with which they are compared
    parameters = (stem if part == TRANSPOSED or part in ROUNDED else name).split(PACKED)
    if not stored.keys() >= set(parameters):
        return False
    sources = [stored[parameter] for parameter in parameters]
    ours = [_split(written[name], sources, axis=1 if part in (TRANSPOSED, INT8) else 0)]
    if part in ROUNDED:
        ours += [
            _split(written[name + ending], sources, axis=0)
            for ending in (SCALES, ZEROS)
            if name + ending in written
        ]
    compare: Callable[..., bool] = ROUNDED.get(part) or partial(_equal, transposed=part == TRANSPOSED)
    return all(map(len, ours)) and all(
        compare(*parts, source.read())  # pyright: ignore[reportCallIssue] - two parts where there are scales
        for *parts, source in zip(*ours, sources, strict=True)
    )


def _split(written: StoredTensor, sources: Sequence[StoredTensor], axis: int) -> Sequence[Tensor]:
    """What a weight has of each of the `sources` that it was made of, along an axis; nothing if it is not as long."""
    if len(sources) == 1:
        return (written.read(),)
    counts = [source.shape[0] for source in sources]
    return torch.split(written.read(), counts, axis) if sum(counts) == written.shape[axis] else ()


def _equal(ours: Tensor, theirs: Tensor, transposed: bool) -> bool:
    """Bit for bit, a few rows of the checkpoint's at a time."""
    if ours.shape != (theirs.shape[::-1] if transposed else theirs.shape):
        return False
    if not transposed:
        ours = ours.reshape(*theirs.shape[:1], -1)
    theirs = theirs.reshape(*theirs.shape[:1], -1)
    return all(
        torch.equal(
            # PyTorch is quick to transpose a matrix, and slow with a part of one.
            _bits(ours[:, rows].contiguous().t().contiguous() if transposed else ours[rows]),
            _bits(theirs[rows].to(ours.dtype)),
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


def _q8_rounded(numbers: Tensor, scales: Tensor, weight: Tensor) -> bool:
    """Numbers [N, blocks, size] uint8, or as a table [N, K], 128 being zero; scales [N, blocks] half."""
    return all(
        _within(
            numbers[rows].flatten(1).float() - 128,
            scales[rows].float().repeat_interleave(numbers.shape[1:].numel() // scales.shape[1], dim=1),
            _filled_up(weight[rows].float(), numbers.shape[1:].numel()),
        )
        for rows in _rows(weight.shape[0])
    )


def _q4_rounded(numbers: Tensor, scales: Tensor, zeros: Tensor, weight: Tensor) -> bool:
    """Numbers [N, blocks, size / 2] uint8, or as a table [N, K / 2]; scales [N, blocks] half; zeros [N, blocks / 2].

    Of two in a byte the first is in the low bits. Blocks past those of the weight are of one offset for each of those.
    """
    N, K = weight.shape
    count = scales.shape[1]
    size = 2 * numbers.shape[1:].numel() // count
    blocks = -(-K // size)

    def within(rows: slice) -> bool:
        steps = scales[rows].float()  # [N, count]
        levels = _apart(numbers[rows].flatten(1)).view(-1, count, size).float()
        middle = _apart(zeros[rows])[:, :count].float()
        values = (levels - middle[..., None]) * steps[..., None]  # [N, count, size]
        allowed = (0.5 + SLACK) * steps[:, :blocks].abs()
        main = values[:, :blocks]
        if count > blocks:
            offsets = values[:, blocks:].flatten(1)[:, :blocks]
            main = main + offsets[..., None]
            # The last level of a block of offsets is a whole step away at most, any other half a step.
            allowed = allowed + steps[:, blocks:].abs().repeat_interleave(size, dim=1)[:, :blocks] * (
                1 + SLACK
            )
        gap = (main - _filled_up(weight[rows].float(), blocks * size).view(-1, blocks, size)).abs()
        # Levels at either end stand for whatever lies past them: up to a whole step, by the rounding of the zero.
        ends = (levels[:, :blocks] == 0) | (levels[:, :blocks] == 15)
        inner = torch.where(ends, torch.zeros_like(gap), gap)
        past = steps[:, :blocks].abs() * (1 + SLACK) + allowed
        return bool((inner <= allowed[..., None]).all() and (gap <= past[..., None]).all())

    return all(within(rows) for rows in _rows(N))


def _apart(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)


def _filled_up(weight: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(weight, (0, width - weight.shape[1]))


def _rows(count: int) -> list[slice]:
    return [slice(start, start + ROWS) for start in range(0, count, ROWS)]


def _within(numbers: Tensor, scales: Tensor, weight: Tensor) -> bool:
    """Whether all numbers stand for the weight to within half a step; a little more at ±127 of a scale in half."""
    steps = torch.where(numbers.abs() == 127, 0.5 + 127 * torch.finfo(torch.float16).eps, 0.5)
    return bool(((numbers * scales - weight.float()).abs() <= (steps + SLACK) * scales.abs()).all())


ROUNDED: dict[str, Callable[..., bool]] = {
    INT8: _int8_rounded,
    IN_BLOCKS.format(8): _q8_rounded,
    IN_BLOCKS.format(4): _q4_rounded,
}
