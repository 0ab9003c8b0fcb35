"""Where an ONNX graph keeps its weights: read from the file itself, without the onnx package.

A tensor of a graph may name any file as its `external_data`, and ONNX Runtime opens that file. Here the names are
found before it does: a small reader of protobuf's wire format walks the messages of onnx.proto that lead to tensors.
"""

import mmap
import posixpath
from collections.abc import Container, Iterator
from pathlib import Path

from resprune.runtime.errors import ResPruneError

Buffer = bytes | mmap.mmap
MAX_DEPTH = 64
"""Of graphs inside of nodes inside of graphs."""

# Message → the fields that lead to tensors → their message, by the numbers of onnx.proto.
MESSAGES: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {13: "StringStringEntryProto"},
}
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def require_listed(root: Path, graph: str, listed: Container[str]) -> None:
    """`ResPruneError` if the graph's file `root/graph` keeps weights in a file that is not `listed`.

    `graph` and the names in `listed` are relative to `root`; what the graph names is relative to its own directory.
    """
    path = root / graph
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            named = set(_locations(content, 0, len(content), "ModelProto", 0))
    except (
        OSError,
        ValueError,
    ):  # unreadable, empty, or no protobuf: ONNX Runtime will not take it for a graph
        raise ResPruneError(
            f"{path} is not an ONNX graph; copy the bundle again or export it again"
        ) from None
    for location in sorted(named):
        try:
            name = posixpath.normpath(posixpath.join(posixpath.dirname(graph), location.decode()))
        except UnicodeDecodeError:
            name = ""
        if name not in listed or b"\\" in location:
            raise ResPruneError(
                f"{path} keeps weights in {ascii(location)[1:][:80]}, which the bundle does not list; "
                "export the bundle again"
            )


def _locations(content: Buffer, start: int, end: int, message: str, depth: int) -> Iterator[bytes]:
    """The names of files in a message that lies at `content[start:end]`; `ValueError` if it is malformed."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    inner = MESSAGES[message]
    while start < end:
        tag, start = _varint(content, start, end)
        field, wire = tag >> 3, tag & 7
        if wire == BYTES:
            size, start = _varint(content, start, end)
            stop = start + size
            if stop > end:
                raise ValueError("cut short")
            kind = inner.get(field)
            if kind == "StringStringEntryProto":
                yield from _location(content[start:stop])
            elif kind is not None:
                yield from _locations(content, start, stop, kind, depth + 1)
            start = stop
        else:
            start = _skipped(content, start, end, wire)


def _location(entry: bytes) -> Iterator[bytes]:
    """The value of an entry whose key is "location"; where a field stands twice, every combination of them."""
    keys: list[bytes] = []
    values: list[bytes] = []
    start = 0
    while start < len(entry):
        tag, start = _varint(entry, start, len(entry))
        if tag & 7 != BYTES:
            start = _skipped(entry, start, len(entry), tag & 7)
            continue
        size, start = _varint(entry, start, len(entry))
        {1: keys, 2: values}.get(tag >> 3, []).append(entry[start : start + size])
        start += size
    if b"location" in keys:
        yield from values or [b""]


def _skipped(content: Buffer, start: int, end: int, wire: int) -> int:
    """Where a number that begins at `start` ends. Groups, which onnx.proto has none of, are refused."""
    if wire == VARINT:
        return _varint(content, start, end)[1]
    if wire not in (FIXED32, FIXED64):
        raise ValueError("no such wire type")
    return start + (4 if wire == FIXED32 else 8)


def _varint(content: Buffer, start: int, end: int) -> tuple[int, int]:
    """A number of up to ten bytes of seven bits, low ones first, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if start >= end:
            raise ValueError("cut short")
        byte = content[start]
        start += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, start
    raise ValueError("a number without an end")
