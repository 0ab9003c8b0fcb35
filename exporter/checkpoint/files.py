"""One small file of a checkpoint, read as what it is, or refused as what it is instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from resprune.runtime.bundle.strict_json import strict_json
from resprune.runtime.errors import ResPruneError, one_line

MAX_BYTES = 64 << 20
"""The largest JSON file of a checkpoint, the index of a thousand shards, has a few megabytes."""
MAX_DEPTH = 64
"""A config that is nested deeper than this is none, and what reads it by recursion would give up."""
LFS_POINTER = b"version https://git-lfs"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in UTF-8; `ResPruneError`, with what the file is, for anything else."""
    raw = read_small(path)
    if raw.startswith(b"\xef\xbb\xbf"):
        raise ResPruneError(
            f"{path} begins with a byte order mark, with which transformers does not read it; save it as UTF-8 "
            "without one"
        )
    try:
        value = strict_json(raw, MAX_DEPTH)
    except ValueError as error:
        raise ResPruneError(f"{path} is not valid JSON ({one_line(error)}); download it again") from None
    if not isinstance(value, dict):
        raise ResPruneError(f"{path} should hold a JSON object; download it again")
    return value


def read_small(path: Path) -> bytes:
    """The bytes of a file that is no Git LFS pointer and not too large."""
    refuse_pointer(path)
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ResPruneError(f"{path} has {size:,} bytes, too many for a file of settings; download it again")
    return path.read_bytes()


def refuse_pointer(path: Path) -> None:
    """`ResPruneError` if a file holds, in place of its content, where Git LFS would find that."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ResPruneError(
                f"{path} is a Git LFS pointer and not the file itself; run `git lfs pull` in {path.parent}"
            )
