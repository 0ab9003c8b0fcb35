"""Lazily read safetensors: one file or shards, headers parsed up front, each weight mapped only while it is read.

The format is https://huggingface.co/docs/safetensors: eight bytes with the header's length, a JSON header, then the
data. Nothing here ever holds more than one weight.

By hand, because the safetensors library does not say where in a file a weight lies, which is what hints to the system,
copies of bytes and views of a few rows need. Measured with safetensors 0.8 on 145 bf16 weights of 518 MB, each read
once on one thread: a file that `safe_open` holds open ends resident as a whole (800 MB for 470 here); opened anew for
each weight it takes 0.19 s of processor time for 0.12 here. Its header takes 0.16 ms for 0.35, once an export.
"""

from __future__ import annotations

import json
import math
import mmap
import operator
import os
import struct
import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resprune.exporter.checkpoint.files import read_json, refuse_pointer
from resprune.runtime.errors import ResPruneError, shown

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# The header of a checkpoint with thousands of tensors is under 1 MB; the reference reader's limit is the same.
MAX_HEADER_BYTES = 100_000_000

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What a model's weights can be stored as."""
DTYPES = FLOATS | {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
SMALL = ("F4", "F6_E2M3", "F6_E3M2")
"""Of the format as well, but of less than a byte."""


COMPARED = 1 << 20
"""Numbers that are compared at a time."""

HINT_BYTES = 1 << 20
"""Of a longer range Linux reads only the beginning when it is told that it will be needed."""

MADV_POPULATE_READ = 22
"""madvise(2), which Python has no name for: read all of it now, at twice the speed of a page when it is touched."""


@dataclass(frozen=True)
class StoredTensor:
    """Where one weight lies: bytes `offset` to `offset + nbytes` of `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def read(self) -> torch.Tensor:
        """The weight as a tensor over mapped, read-only memory, unmapped when the tensor is dropped."""
        return self._mapped(whole=True)

    def view(self) -> torch.Tensor:
        """As `read`, but what is not used is not read: for a few rows of a large table."""
        return self._mapped(whole=False)

    def _mapped(self, *, whole: bool) -> torch.Tensor:
        if self.nbytes == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        page = self.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        skipped = self.offset - page
        with self.file.open("rb") as file:
            # ACCESS_COPY because torch wants writable memory; nothing writes to it.
            mapped = mmap.mmap(file.fileno(), skipped + self.nbytes, access=mmap.ACCESS_COPY, offset=page)
        if whole and sys.platform == "linux":
            mapped.madvise(mmap.MADV_SEQUENTIAL)
            with suppress(OSError):  # before Linux 5.14
                mapped.madvise(MADV_POPULATE_READ)
        flat = torch.frombuffer(mapped, dtype=torch.uint8, count=self.nbytes, offset=skipped)
        if self.offset % self.dtype.itemsize:  # a header of odd length: legal, but not viewable in place
            flat = flat.clone()
        return flat.view(self.dtype).reshape(self.shape)


def read_soon(places: Iterable[StoredTensor], room: int) -> None:
    """Have the system read weights into its cache, `room` bytes of them at most, in this order.

    Only a hint, where there is one to give. It takes as long as reading does, so that a thread should give it.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    with ExitStack() as stack:
        opened: dict[Path, int] = {}
        for place in places:
            room -= place.nbytes
            if room < 0:
                return
            if place.file not in opened:
                opened[place.file] = stack.enter_context(place.file.open("rb")).fileno()
            for start in range(0, place.nbytes, HINT_BYTES):
                count = min(HINT_BYTES, place.nbytes - start)
                os.posix_fadvise(opened[place.file], place.offset + start, count, os.POSIX_FADV_WILLNEED)


def open_weights(root: Path) -> dict[str, StoredTensor]:
    """Name → place of every weight in checkpoint directory `root`: those that transformers takes.

    One file goes before an index, which may be that of older shards. Raises `ResPruneError` for a pickle-only
    checkpoint, a missing shard, and a truncated or corrupt file.
    """
    if (root / SINGLE_NAME).is_file():
        return read_header(root / SINGLE_NAME)
    if (root / INDEX_NAME).is_file():
        return _open_shards(root)
    pickles = sorted(path.name for path in root.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ResPruneError(
            f"{root} has its weights only as pickles ({pickles[0]}), which can run any code when they are opened; "
            "convert them with transformers' save_pretrained, or take a revision that has safetensors"
        )
    raise ResPruneError(
        f"{root} has neither {SINGLE_NAME} nor {INDEX_NAME}; give a directory with safetensors"
    )


def passed_over(root: Path) -> str | None:
    """A sentence if there are whole shards with other weights beside the one file that is taken; else None."""
    if not ((root / SINGLE_NAME).is_file() and (root / INDEX_NAME).is_file()):
        return None
    try:
        shards = _open_shards(root)
    except ResPruneError:  # of which some are gone: what is left of an earlier save
        return None
    taken = read_header(root / SINGLE_NAME)
    if taken.keys() == shards.keys() and all(_equal(tensor, shards[name]) for name, tensor in taken.items()):
        return None
    return (
        f"{root} has {SINGLE_NAME} and shards with other weights; {SINGLE_NAME} is taken, as transformers does: "
        f"delete {INDEX_NAME} and its shards, or {SINGLE_NAME} if they are the right ones"
    )


def untied(weights: Mapping[str, StoredTensor]) -> bool:
    """Whether an output head is stored with other values than the embedding table that it may be tied to."""
    pair = [
        [tensor for name, tensor in weights.items() if f".{name}".endswith(suffix)]
        for suffix in (".embed_tokens.weight", ".lm_head.weight")
    ]
    return all(len(found) == 1 for found in pair) and not _equal(pair[0][0], pair[1][0])


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two weights have the same values, whatever they are stored as; a part at a time."""
    if one.shape != other.shape:
        return False
    parts = zip(*(torch.split(tensor.read().reshape(-1), COMPARED) for tensor in (one, other)), strict=True)
    return all(torch.equal(part.double(), like.double()) for part, like in parts)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one safetensors file, checked against the file's size; `ResPruneError` if it is damaged."""
    refuse_pointer(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise _damaged(path, "its header is cut off")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        if not isinstance(header, dict):
            raise TypeError("the header is not an object")
        tensors = {
            name: _stored(path, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"its header does not parse: {error}") from None
    end = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=8 + length)
    if end > size:
        raise _damaged(path, f"it has {size} bytes of {shown(end)}")
    return tensors


def _stored(path: Path, entry: Mapping[str, Any], data_start: int) -> StoredTensor:
    if entry["dtype"] in SMALL:
        raise ResPruneError(
            f"{path} has weights of {entry['dtype']}, which were quantized; export the checkpoint they were made from"
        )
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype {entry['dtype']} is not one of {', '.join(DTYPES)}")
    dtype, shape = DTYPES[entry["dtype"]], tuple(map(operator.index, entry["shape"]))
    begin, end = map(operator.index, entry["data_offsets"])
    if begin < 0 or min(shape, default=0) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"shape {shown([*shape])} does not fill bytes {shown([begin, end])}")
    return StoredTensor(path, dtype, shape, data_start + begin, end - begin)


def _open_shards(root: Path) -> dict[str, StoredTensor]:
    try:
        weight_map = read_json(root / INDEX_NAME)["weight_map"]
        shards = sorted({str(file) for file in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _damaged(root / INDEX_NAME, "it has no weight_map") from None
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        if Path(shard).name != shard:
            raise _damaged(root / INDEX_NAME, f"the shard {shard!r} is not a file name")
        if not (root / shard).is_file():
            raise ResPruneError(f"{root} lacks the shard {shard}; download it again or copy it there")
        tensors.update(read_header(root / shard))
    absent = sorted(set(weight_map) - set(tensors))
    if absent:
        raise _damaged(root / weight_map[absent[0]], f"it lacks {absent[0]}, which the index promises")
    return tensors


def _damaged(path: Path, what: str) -> ResPruneError:
    return ResPruneError(f"{path} is truncated or corrupt ({what}); download it again")
