"""Timing as ratios: the things compared take turns, and each is a median with its spread.

They take turns in one process, or, where they do not fit into memory or into one environment together, as processes.
"""

from __future__ import annotations

import json
import os
import platform
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from resprune.runtime.bench.measure import Timing, cpu_flags, peak_bytes, processor, timing

THREADS = os.cpu_count() or 1
RESPRUNE = [str(Path(sys.executable).with_name("resprune"))]


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
    return {name: timing(1e3 * np.array(values)) for name, values in seconds.items()}


@dataclass
class Samples:
    """Milliseconds of stages, by case and stage; the case "" is what all cases share."""

    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    @contextmanager
    def time(self, stage: str, case: str = "") -> Iterator[None]:
        """Note how long the block takes."""
        start = perf_counter()
        yield
        self.values.setdefault(case, {}).setdefault(stage, []).append(1e3 * (perf_counter() - start))

    def add(self, other: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
        """Take in what another process has sampled."""
        for case, stages in other.items():
            for stage, milliseconds in stages.items():
                self.values.setdefault(case, {}).setdefault(stage, []).extend(milliseconds)


class Staged(Protocol):
    """A model whose way from a picture to its answer goes stage by stage; what a stage hands on is its own affair."""

    def pixels(self, picture: Path) -> Any:
        """What the encoder takes."""

    def encode(self, pixels: Any) -> Any:
        """All tokens of the picture."""

    def prompt(self, question: str) -> Any:
        """The prompt, tokenized and embedded."""

    def select(self, pixels: Any, features: Any, prompt: Any, k: int | None) -> Any:
        """The `k` tokens that are kept; None keeps all."""

    def prefill(self, prompt: Any, kept: Any) -> tuple[int, int]:
        """The length of the prompt with its visual tokens, and the first token of the answer."""

    def decode(self, token: int, steps: int) -> None:
        """`steps` tokens after `token`."""


def sample_stages(model: Staged, spec: Mapping[str, Any], budgets: Iterable[int]) -> dict[str, Any]:
    """Every stage at every K, the smallest first, so that the peak of memory at a K is that K's own; all tokens last.

    `spec`: `picture`, `question`, `repeats`, and `steps` to decode; one turn more goes ahead, to warm up.
    """
    samples = Samples()
    tokens: dict[str, int] = {}
    memory: dict[str, float | None] = {}
    smallest_first = sorted(budgets)
    for turn in range(spec["repeats"] + 1):
        warm_up = turn == 0
        clock = Samples() if warm_up else samples
        with clock.time("pixels"):
            pixels = model.pixels(Path(spec["picture"]))
        with clock.time("encode"):
            features = model.encode(pixels)
        with clock.time("prompt"):
            prompt = model.prompt(spec["question"])
        for k in smallest_first[:1] if warm_up else [*smallest_first, None]:
            case = "all" if k is None else str(k)
            reset_peak()
            with clock.time("select", case):
                kept = model.select(pixels, features, prompt, k)
            with clock.time("prefill", case):
                tokens[case], first = model.prefill(prompt, kept)
            with clock.time("decode", case):
                model.decode(first, spec["steps"])
            memory[case] = peak_mebibytes()
    return {
        "samples": samples.values,
        "steps": spec["steps"],
        "memory": memory,
        "prompt tokens": tokens,
    }


def processes_take_turns(commands: Mapping[str, Sequence[str]], rounds: int) -> dict[str, dict[str, Any]]:
    """Run each command `rounds` times, in turn; each prints JSON with `samples` as its last line.

    The order within a round is drawn anew, so that no command always comes after the same one. Returns what each
    printed last, its `samples` those of all rounds. One that fails is `{"fault": …}` and is not run again.
    """
    replies: dict[str, dict[str, Any]] = {}
    samples = {name: Samples() for name in commands}
    order = list(commands)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            if "fault" in replies.get(name, {}):
                continue
            try:
                out, _, _ = run(commands[name])
            except RuntimeError as error:
                replies[name] = {"fault": str(error).strip().splitlines()[-1]}
                continue
            replies[name] = json.loads(out.strip().splitlines()[-1])
            samples[name].add(replies[name]["samples"])
            replies[name]["samples"] = samples[name].values
    return {name: replies[name] for name in commands}


def peak_mebibytes() -> float:
    """The largest resident memory of this process since `reset_peak`, in 2^20 bytes."""
    peak = peak_bytes()
    assert peak is not None, "the benchmarks run on Linux"
    return peak / (1 << 20)


def reset_peak() -> None:
    """Let `peak_mebibytes` begin anew (Linux: proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, threads, versions."""
    packages = ("onnxruntime", "torch", "transformers", "onnx", "numpy")
    return {
        "processor": processor(),
        "threads": THREADS,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def bfloat16_in_hardware() -> bool:
    """Whether this processor multiplies bfloat16."""
    return bool({"avx512_bf16", "amx_bf16"} & set(cpu_flags()))


def run(command: Sequence[str]) -> tuple[str, float, float]:
    """Run a command; returns its standard output, its seconds, and its peak resident memory in 2^20 bytes."""
    probe = (
        "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr); sys.exit(code)"
    )
    start = perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", probe, *command], capture_output=True, text=True, check=False
    )
    seconds = perf_counter() - start
    said, _, peak = done.stderr.rstrip().rpartition("\n")  # the probe's line is the last
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}: {said}")
    return done.stdout, seconds, int(peak) / 1024


def exported(model: Path | str, bundle: Path, *options: str) -> Path:
    """`model` exported to `bundle`, anew: one that is there may be another version's."""
    run([*RESPRUNE, "export", str(model), str(bundle), *options, "--force"])
    return bundle


def plain(value: Any) -> Any:
    """Timings as JSON values."""
    if isinstance(value, Timing):
        return asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    return value
