"""Timing as ratios: the things compared take turns in one process, and each is a median with its spread."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

THREADS = os.cpu_count() or 1


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median, and the first and third quartile of `repeats` calls."""

    median: float
    low: float
    high: float
    repeats: int

    def __str__(self) -> str:
        """Median (quartiles)."""
        return f"{self.median:.4g} ({self.low:.4g}–{self.high:.4g})"


def take_turns(
    calls: Mapping[str, Callable[[], object]], repeats: int, warm_up: int = 1
) -> dict[str, Timing]:
    """Time each call `repeats` times, one after the other in turn, so that a noisy minute hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm_up + repeats):
        for name, call in calls.items():
            start = perf_counter()
            call()
            if turn >= warm_up:
                seconds[name].append(perf_counter() - start)
    return {name: _timing(values) for name, values in seconds.items()}


def _timing(seconds: Sequence[float]) -> Timing:
    low, median, high = np.percentile(np.array(seconds) * 1e3, [25, 50, 75])
    return Timing(float(median), float(low), float(high), len(seconds))


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, threads, versions."""
    packages = ("onnxruntime", "torch", "transformers", "onnx", "numpy")
    return {
        "processor": _processor(),
        "threads": THREADS,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def _processor() -> str:
    """The model name, and which matrix extensions it has: they decide what half precision costs."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    known = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile") if flag in flags]
    return f"{name or platform.processor()} ({' '.join(known)})"


def run(command: Sequence[str]) -> tuple[str, float, float]:
    """Run a command; returns its standard output, its seconds, and its peak resident memory in megabytes."""
    probe = (
        "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr); sys.exit(code)"
    )
    start = perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", probe, *command], capture_output=True, text=True, check=False
    )
    seconds = perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}: {done.stderr}")
    return done.stdout, seconds, int(done.stderr.split()[-1]) / 1024


def plain(value: Any) -> Any:
    """Timings as JSON values."""
    if isinstance(value, Timing):
        return asdict(value)
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    return value
