"""Safetensors read lazily; damaged and hostile files are refused with one sentence."""

import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from resprune.exporter.checkpoint.shards import HINT_BYTES, StoredTensor, open_weights, read_header, read_soon
from resprune.runtime.errors import ResPruneError


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_reads_what_safetensors_wrote(dtype, tmp_path):
    tensors = {
        "matrix": (torch.arange(12) % 5).reshape(3, 4).to(dtype),
        "scalar": torch.ones((), dtype=dtype),
        "empty": torch.zeros((0, 4), dtype=dtype),
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    stored = open_weights(tmp_path)
    assert set(stored) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(stored[name].read(), tensor)
        assert stored[name].read().dtype == dtype


def test_a_header_of_odd_length_is_read(tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * (1 - len(header) % 2)
    path = write(tmp_path / "model.safetensors", header, struct.pack("<2f", 1.5, -2))
    assert read_header(path)["w"].read().tolist() == [1.5, -2]


def test_what_fits_is_read_soon(tmp_path, monkeypatch):
    """In components that Linux takes whole; nothing where the system takes no hints."""
    long, short = HINT_BYTES + 100, 300
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(bytes(long + short))
    places = [
        StoredTensor(tmp_path / name, torch.uint8, (count,), offset, count)
        for name, offset, count in (("one", 0, long), ("two", long, short), ("one", long, short))
    ]
    hints: list[tuple[int, ...]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *hint: hints.append(hint[:2]), raising=False)
    read_soon(places, long + short)
    assert hints == [(0, HINT_BYTES), (HINT_BYTES, 100), (long, short)]
    monkeypatch.delattr(os, "posix_fadvise")
    read_soon(places, long + short)
    assert len(hints) == 3


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD_HEADERS: dict[str, Any] = {
    "no json": b"\xff\xfe{}",
    "a list": [],
    "entry of the wrong kind": {"w": 3},
    "unknown dtype": {"w": GOOD | {"dtype": "F9"}},
    "no shape": {"w": {"dtype": "F32", "data_offsets": [0, 8]}},
    "shape that does not fill its bytes": {"w": GOOD | {"shape": [3]}},
    "negative shape": {"w": GOOD | {"shape": [-2]}},
    "negative offset": {"w": GOOD | {"data_offsets": [-8, 0]}},
    "reversed offsets": {"w": GOOD | {"data_offsets": [8, 0]}},
    "past the end": {"w": GOOD | {"data_offsets": [8, 16]}},
    "an infinite offset": {"w": GOOD | {"data_offsets": [0, math.inf]}},
    "a fraction in the shape": {"w": GOOD | {"shape": [2.5]}},
    "offsets as text": {"w": GOOD | {"data_offsets": ["0", "8"]}},
    "offsets of 4,000 digits": {"w": GOOD | {"data_offsets": [10**4000 - 8, 10**4000]}},
    "deep nesting": b"[" * 100_000,
}


@pytest.mark.parametrize("header", BAD_HEADERS.values(), ids=BAD_HEADERS.keys())
def test_a_bad_header_is_refused(header, tmp_path):
    path = write(tmp_path / "model.safetensors", header, bytes(8))
    with pytest.raises(
        ResPruneError, match=r"model\.safetensors is truncated or corrupt .*; download it again"
    ) as caught:
        open_weights(tmp_path)
    assert len(str(caught.value)) < len(str(tmp_path)) + 400
    assert path.exists()


@pytest.mark.parametrize("kept", [0, 4, 8, 20, -1])
def test_a_truncated_file_is_refused(kept, tmp_path):
    save_file({"w": torch.ones(64)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:kept])
    with pytest.raises(ResPruneError, match="truncated or corrupt"):
        open_weights(tmp_path)


def test_a_header_length_beyond_the_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(ResPruneError, match="its header is cut off"):
        open_weights(tmp_path)


def test_pickles_are_refused_with_the_reason(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ResPruneError, match=r"only as pickles \(pytorch_model.bin\), which can run any code"):
        open_weights(tmp_path)


def test_no_weights_at_all(tmp_path):
    with pytest.raises(ResPruneError, match=r"neither model\.safetensors nor"):
        open_weights(tmp_path)


def index(root: Path, weight_map: Any) -> None:
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_missing_shard_is_named(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model-1.safetensors")
    index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    with pytest.raises(ResPruneError, match=r"lacks the shard model-2\.safetensors"):
        open_weights(tmp_path)


BAD_INDEXES: dict[str, Any] = {
    "a shard without the promised weight": {"a": "model-1.safetensors", "b": "model-1.safetensors"},
    "a shard elsewhere": {"a": "../model-1.safetensors"},
    "a list": ["a"],
}


@pytest.mark.parametrize("weight_map", BAD_INDEXES.values(), ids=BAD_INDEXES.keys())
def test_a_bad_index_is_refused(weight_map, tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model-1.safetensors")
    index(tmp_path, weight_map)
    with pytest.raises(ResPruneError, match="truncated or corrupt"):
        open_weights(tmp_path)


def test_shards_are_read_together(tiny_checkpoint: Callable[[str], Path]):
    stored = open_weights(tiny_checkpoint("siglip-mistral"))
    assert len({tensor.file for tensor in stored.values()}) == 3
    assert all(tensor.dtype == torch.bfloat16 for tensor in stored.values())
