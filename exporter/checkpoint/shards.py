"""Lazily read safetensors: one file or shards, headers parsed up front, each weight mapped only while it is read.

The format is https://huggingface.co/docs/safetensors: eight bytes with the header's length, a JSON header, then the
data. Nothing here ever holds more than one weight.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resprune.runtime.errors import ResPruneError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# The header of a checkpoint with thousands of tensors is under 1 MB; the reference reader's limit is the same.
MAX_HEADER_BYTES = 100_000_000

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


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
    """Name → place of every weight in checkpoint directory `root`.

    Raises `ResPruneError` for a pickle-only checkpoint, a missing shard, and a truncated or corrupt file.
    """
    if (root / INDEX_NAME).is_file():
        return _open_shards(root)
    if (root / SINGLE_NAME).is_file():
        return read_header(root / SINGLE_NAME)
    pickles = sorted(path.name for path in root.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ResPruneError(
            f"{root} has its weights only as pickles ({pickles[0]}), which can run any code when they are opened; "
            "convert them with transformers' save_pretrained, or take a revision that has safetensors"
        )
    raise ResPruneError(
        f"{root} has neither {SINGLE_NAME} nor {INDEX_NAME}; give a directory with safetensors"
    )


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one safetensors file, checked against the file's size; `ResPruneError` if it is damaged."""
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
        raise _damaged(path, f"it has {size} bytes of {end}")
    return tensors


def _stored(path: Path, entry: Mapping[str, Any], data_start: int) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype {entry['dtype']} is not one of {', '.join(DTYPES)}")
    dtype, shape = DTYPES[entry["dtype"]], tuple(int(size) for size in entry["shape"])
    begin, end = (int(value) for value in entry["data_offsets"])
    if begin < 0 or min(shape, default=0) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"shape {list(shape)} does not fill bytes {begin} to {end}")
    return StoredTensor(path, dtype, shape, data_start + begin, end - begin)


def _open_shards(root: Path) -> dict[str, StoredTensor]:
    try:
        weight_map = json.loads((root / INDEX_NAME).read_bytes())["weight_map"]
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
