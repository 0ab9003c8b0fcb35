"""Weights from the mapped checkpoint into a graph's external data file, one at a time and cast on the way."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from resprune.exporter.checkpoint.checkpoint import Checkpoint
from resprune.exporter.checkpoint.shards import DTYPES, FLOATS, StoredTensor
from resprune.exporter.components import Component, Components
from resprune.exporter.trace.quantize import packed_bytes, packed_chunks
from resprune.exporter.trace.tracer import Traced, Weight
from resprune.runtime.bundle.manifest import FileSpec
from resprune.runtime.bundle.precisions import Choice
from resprune.runtime.errors import ResPruneError

PAGE = 4096
"""Alignment of large weights, so that they can be mapped; small ones get SMALL, which is what CUDA wants."""
SMALL = 256
LARGE_BYTES = 64 << 10
CHUNK_BYTES = 16 << 20
PENDING = 2
"""Chunks that may wait to be written, while one more is being made."""
OVERHEAD_BYTES = 32 << 20
"""Graph structure, alignment, tokenizer and manifest, which the count of weights leaves out."""
# Written by older versions of transformers, recomputed by the model itself.
COMPUTED = (".position_ids", "inv_freq", ".embed_scale")


def find_weights(checkpoint: Checkpoint, model: nn.Module) -> dict[str, StoredTensor]:
    """Parameter name of the Hugging Face model → stored weight, for every parameter.

    Old names are translated as transformers itself does; either name of a tied pair will do. Raises `ResPruneError`
    for weights that are missing, of another shape, or that the model has no place for.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    current = _renamer(model, parameters)
    stored = {current(key): tensor for key, tensor in checkpoint.weights.items()}
    extra = [name for name in stored if name not in parameters and not name.endswith(COMPUTED)]
    twins: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        twins.setdefault(id(parameter), []).append(name)
    found = {}
    for name, parameter in parameters.items():
        source = next((twin for twin in (name, *twins[id(parameter)]) if twin in stored), None)
        if source is not None:
            found[name] = stored[source]
    missing = [name for name in parameters if name not in found]
    if missing or extra:
        raise ResPruneError(
            f"the weights in {checkpoint.root} do not fit its config: "
            + "; ".join(
                f"{len(names)} {kind} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
                for kind, names in (("missing", missing), ("left over", extra))
                if names
            )
        )
    for name, tensor in found.items():
        if tensor.dtype not in FLOATS.values():
            raise ResPruneError(
                f"{name} in {tensor.file} is stored as {_NAMES[tensor.dtype]}, which is what quantizing makes; export "
                "the checkpoint that it was made from, or save it anew in bfloat16"
            )
        if tensor.shape == (0,):
            raise ResPruneError(
                f"{name} in {tensor.file} is empty (shape [0]), as DeepSpeed's ZeRO-3 leaves weights that were not "
                "gathered; make them whole with its zero_to_fp32.py, or save the model gathered"
            )
        if tensor.shape != tuple(parameters[name].shape):
            raise ResPruneError(
                f"{name} in {tensor.file} has shape {list(tensor.shape)} where the config asks for "
                f"{list(parameters[name].shape)}; the checkpoint's config.json belongs to another model"
            )
    return found


_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def _renamer(model: Any, parameters: Mapping[str, Any]) -> Callable[[str], str]:
    """Stored name → the name that the installed transformers gives the parameter, by its own table."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    known = dict(parameters)

    def current(key: str) -> str:
        name: str
        name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if converter is not None:
            raise ResPruneError(
                f"the weight {key} is stored in an old layout; save the checkpoint anew first"
            )
        return name

    return current


def bytes_needed(components: Components, choice: Choice, block: int, *, decoder: bool = True) -> int:
    """Upper bound of a bundle's size; each component carries its own copy of the weights that it uses."""
    parts = (components.vision, components.embed, components.decoder)[: 2 + decoder]
    return OVERHEAD_BYTES + sum(_weight_bytes(components, part, choice, block) for part in parts)


def _weight_bytes(components: Components, component: Component, choice: Choice, block: int) -> int:
    """Bytes of a component's weights in the precision that it is to have, at most; tied ones are one."""
    row = choice.of(component.name)
    sizes: dict[int, int] = {}
    for layer in component.module.modules():
        if component is components.decoder and isinstance(layer, nn.Embedding):
            continue  # its input is embedded already; a tied head is counted as a linear layer
        for name, tensor in layer.named_parameters(recurse=False):
            packed = row.quantized and isinstance(layer, nn.Linear) and name == "weight"
            N, K = tensor.shape if packed else (0, 0)
            size = packed_bytes(row, K, N, block) if packed else tensor.nbytes
            # The head is the one that may have more bits than its component.
            sizes[id(tensor)] = size * ((row.head_bits or 1) // (row.bits or 1) if packed and row.bits else 1)
    return sum(sizes.values())


def data_size(traced: Traced) -> int:
    """Bytes of a graph's data file, alignment included."""
    return max((end for *_, end in _layout(traced.model)), default=0)


def write_graph(traced: Traced, path: Path, owner: Path | None = None) -> dict[Path, FileSpec]:
    """Write `path`, whose weights are to be in `path` + "_data"; returns the size and SHA-256 of what was written.

    Those of a graph `owner` in the same folder, which has the same and is written, are referred to where they are.
    """
    model = onnx.ModelProto()
    model.CopyFrom(traced.model)
    owned = [] if owner is None else onnx.load(owner, load_external_data=False).graph.initializer
    places = {tensor.name: [*tensor.external_data] for tensor in owned}
    for tensor, _, begin, end in _layout(model):
        del tensor.external_data[:]
        if owner is not None:
            tensor.external_data.extend(places[tensor.name])
            continue
        where = {"location": data_path(path).name, "offset": begin, "length": end - begin}
        for key, value in where.items():
            tensor.external_data.add(key=key, value=str(value))
    with _HashedFile(path) as file:
        file.write(model.SerializeToString())
    return {path: file.spec}


def write_weights(
    traced: Traced,
    path: Path,
    stored: Mapping[str, StoredTensor],
    progress: Callable[[int, int], object] = lambda count, complete: None,
) -> dict[Path, FileSpec]:
    """Write the weights of the graph `path`, if it has any; returns the size and SHA-256 of what was written.

    `progress(count, complete)` is called as `count` more bytes are on their way, and the first `complete` of all are in
    the file. Raises `OSError` if the disk is full.
    """
    if not traced.weights:
        return {}
    columns = [
        4 * sum(stored[parameter].shape[0] for parameter in weight.parameters)
        for weight in traced.weights.values()
        if weight.transposed
    ]
    size = max([CHUNK_BYTES, *columns])  # at least one column of each
    buffers = cycle([torch.empty(size, dtype=torch.uint8) for _ in range(PENDING + 1)])
    places = [*_layout(traced.model)]
    weights = [traced.weights[tensor.name] for tensor, *_ in places]
    with one_thread(), _HashedFile(data_path(path)) as file:
        sources = _read_ahead(weights, stored)
        for (tensor, padding, _, end), weight, tensors in zip(places, weights, sources, strict=True):
            file.write(bytes(padding))
            for chunk in _chunks(weight, tensors, buffers):
                file.write(chunk.view(torch.uint8).numpy().data)
                progress(chunk.nbytes, file.complete)
            assert file.size == end, f"{tensor.name} ends at {file.size} where the graph has {end}"
    progress(0, file.complete)
    return {data_path(path): file.spec}


def _read_ahead(weights: Iterable[Weight], stored: Mapping[str, StoredTensor]) -> Iterator[list[Tensor]]:
    """The parameters of each weight, while a thread already reads those of the next one."""

    def read(weight: Weight) -> list[Tensor]:
        return [_in_range(name, stored[name], weight.largest) for name in weight.parameters]

    with ThreadPoolExecutor(1) as thread:
        following: deque[Future[list[Tensor]]] = deque()
        for weight in weights:
            following.append(thread.submit(read, weight))
            if len(following) > 1:
                yield following.popleft().result()
        yield from (future.result() for future in following)


def _in_range(name: str, place: StoredTensor, largest: float) -> Tensor:
    """A weight as it is stored; `ResPruneError` if a number of it is none, or its magnitude is past the `largest`."""
    weight = place.read()
    if weight.numel():
        low, high = (float(end) for end in torch.aminmax(weight))  # one pass, and NaN goes through it
        if not (math.isfinite(low) and math.isfinite(high)):
            what = "NaN" if math.isnan(low) else "infinite numbers"
            raise ResPruneError(
                f"{name} in {place.file} has {what}, so every answer would be void; take the checkpoint from before "
                "its training failed, or download it again"
            )
        if max(-low, high) > largest:
            raise ResPruneError(
                f"{name} in {place.file} has a number of magnitude {max(-low, high):,.0f}, and the largest that its "
                f"precision can hold is {largest:,.0f}; export with --dtype bf16 or fp32"
            )
    return weight


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch without threads of its own: tiles are too small for them, and they would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _HashedFile:
    """A new file that one thread writes and another hashes, while the next bytes are being prepared."""

    def __init__(self, path: Path) -> None:
        self.size = 0
        """Bytes that it was given."""
        self.complete = 0
        """Of these the ones that are in the file."""
        self._file = path.open("wb", buffering=0)
        self._digest = hashlib.sha256()
        self._threads = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._pending: deque[tuple[int, list[Future[Any]]]] = deque()

    def write(self, content: bytes | memoryview) -> None:
        """Take over `content`, which must not change any more; an `OSError` may be that of an earlier write."""
        self.size += len(content)
        writing, hashing = self._threads
        tasks = [writing.submit(self._write, content), hashing.submit(self._digest.update, content)]
        self._pending.append((self.size, tasks))
        while len(self._pending) > PENDING:
            self._finish()

    def _write(self, content: bytes | memoryview) -> None:
        rest = memoryview(content)
        while rest:  # a large write may be done in part
            rest = rest[self._file.write(rest) :]

    def _finish(self) -> None:
        size, futures = self._pending.popleft()
        for future in futures:
            future.result()
        self.complete = size

    def __enter__(self) -> _HashedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with self._file, self._threads[0], self._threads[1]:
            while self._pending and kind is None:
                self._finish()

    @property
    def spec(self) -> FileSpec:
        """What was written, once the file is closed."""
        return FileSpec(self.size, self._digest.hexdigest())


def _external(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    return [tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]


def _chunks(weight: Weight, tensors: Sequence[Tensor], buffers: Iterator[Tensor]) -> Iterator[Tensor]:
    """The weight made of `tensors`, in its final dtype and layout, flat, a few megabytes at a time."""
    if weight.part:
        yield from packed_chunks(weight, tensors)
    elif weight.transposed:
        yield from _transposed(tensors, weight.dtype, buffers)
    else:
        step = CHUNK_BYTES // weight.dtype.itemsize
        flat = (tensor.reshape(-1) for tensor in tensors)
        yield from (part.to(weight.dtype) for numbers in flat for part in torch.split(numbers, step))


def _transposed(
    matrices: Sequence[Tensor], dtype: torch.dtype, buffers: Iterator[Tensor]
) -> Iterator[Tensor]:
    """Columns of matrices that are one below the other, as rows.

    Each chunk lies in the next of `buffers`: memory that is taken anew for each costs as much as filling it.
    """
    rows = [len(matrix) for matrix in matrices]
    columns = matrices[0].shape[1]
    step = max(1, CHUNK_BYTES // max(1, sum(rows) * dtype.itemsize))
    for start in range(0, columns, step):
        # Into a matrix of their own first: PyTorch is quick to transpose one, and slow with a part of one.
        part = torch.empty(sum(rows), min(step, columns - start), dtype=dtype)
        for place, matrix in zip(torch.split(part, rows), matrices, strict=True):
            place.copy_(matrix[:, start : start + step])
        buffer = next(buffers)[: part.nbytes].view(dtype)
        yield buffer.view(part.shape[::-1]).copy_(part.t()).reshape(-1)


def _layout(model: onnx.ModelProto) -> Iterator[tuple[onnx.TensorProto, int, int, int]]:
    """Each weight with the bytes of padding before it, and where it begins and ends in the file."""
    position = 0
    for tensor in _external(model):
        count = _byte_count(tensor)
        begin = _aligned(position, count)
        yield tensor, begin - position, begin, begin + count
        position = begin + count


def data_path(path: Path) -> Path:
    """Where a graph's weights are, unless it refers to those of another."""
    return path.with_name(f"{path.name}_data")


def _byte_count(tensor: onnx.TensorProto) -> int:
    return int(next(entry.value for entry in tensor.external_data if entry.key == "length"))


def _aligned(position: int, count: int) -> int:
    alignment = PAGE if count >= LARGE_BYTES else SMALL
    return -(-position // alignment) * alignment
