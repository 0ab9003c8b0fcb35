"""How much memory there is to take, and what is therefore compared at once."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from torch import nn

CONTAINERS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
"""What a container may use and does, in versions 2 and 1 of control groups: /proc/meminfo is the host's."""


def available_memory() -> int:
    """Bytes of memory that can be taken without swapping, as far as the system and its container tell."""
    try:
        with Path("/proc/meminfo").open() as file:
            fields = dict(line.split(":", 1) for line in file)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        free = int(os.sysconf("SC_PHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE")) // 2
    for folder, limit, used in CONTAINERS:
        with suppress(OSError, ValueError):  # there is none, or it says "max"
            taken = int((folder / used).read_text()) - _cached(folder / "memory.stat")
            free = min(free, int((folder / limit).read_text()) - taken)
    return max(0, free)


def bytes_whole(model: nn.Module, element: str, level: str) -> int | None:
    """Bytes that it takes to compare a whole model at once; None where the decoder is compared by layers.

    `element` is what the model is traced in, `level` "full", "layers", or "auto": by layers where memory is short.
    """
    # Held twice, here in float32 and by ONNX Runtime, which keeps half a weight beside it widened.
    needed = (8 if element == "float32" else 10) * sum(tensor.numel() for tensor in model.parameters())
    whole = needed < available_memory() if level == "auto" else level == "full"
    return needed if whole else None


def _cached(statistics: Path) -> int:
    """Of what a container uses the files that the system will forget when memory is wanted."""
    lines = dict(line.split() for line in statistics.read_text().splitlines())
    return int(lines["inactive_file"])
