"""How much memory there is to take: it decides what is compared at once, and how far is read ahead."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

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


def _cached(statistics: Path) -> int:
    """Of what a container uses the files that the system will forget when memory is wanted."""
    lines = dict(line.split() for line in statistics.read_text().splitlines())
    return int(lines["inactive_file"])
