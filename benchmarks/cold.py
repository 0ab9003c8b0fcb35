"""How long bundles of real size take to start: `resprune ask` up to its prefill, by stages, and its memory."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import LLAMA_7B, QWEN25_3B, QWEN25VL_TOWER
from benchmarks.export_size import forget
from benchmarks.measure import Timing, exported, timing
from benchmarks.measure import run as run_command
from benchmarks.shapes import LLAVA, QUESTION, QWEN25VL, write_picture, write_shape
from benchmarks.starting import PREFILL, TOKEN
from resprune.runtime.bundle.files import read_bundle

LLAVA_7B = replace(LLAVA, name="llava15-7b", text=LLAMA_7B, words="LLaVA-1.5-7B")
QWEN_3B = replace(QWEN25VL, name="qwen25vl-3b", vision=QWEN25VL_TOWER, text=QWEN25_3B, words="Qwen2.5-VL-3B")

BARS = ((LLAVA_7B, 8.0, 4.0e9), (QWEN_3B, 6.0, 2.3e9))
"""The most that a start should take: seconds until the prefill, and bytes of all files of the bundle."""
MEMORY = 0.6e9
"""A start should take at most so many bytes more than the files have."""
OPTIONS = ("-k", "11%", "--preset", "cpu", "--verify", "layers")
CASES = {
    "files in memory": {"check": False},
    "the same, all hashed": {"check": True},
    "files on the disk": {"check": False},
}
"""The first is what the bars are for."""
WARM, _, ON_DISK = CASES
ROUNDS = 3


def run(work: Path, rounds: int = ROUNDS) -> dict[str, Any]:
    """Each shape with random weights. A bundle that is in `work` is taken as it is; what is made here goes again."""
    picture = work / "cold.png"
    figures: dict[str, Any] = {}
    for shape, seconds, size in BARS:
        write_picture(shape.picture, picture)
        bundle, checkpoint = work / f"{shape.name}-cpu", work / shape.name
        made = [path for path in (bundle, checkpoint) if not bundle.exists() and not path.exists()]
        try:
            if checkpoint in made:
                write_shape(shape, checkpoint)
            if bundle in made:
                exported(checkpoint, bundle, *OPTIONS)
            bars = {"most seconds": seconds, "most bytes": size}
            figures[shape.words] = bars | measure(bundle, picture, rounds)
        finally:
            for path in made:
                shutil.rmtree(path, ignore_errors=True)
    return figures


def measure(bundle: Path, picture: Path, rounds: int) -> dict[str, Any]:
    """The cases in turn, each start in a process of its own; one more goes ahead, which hashes what never was."""
    files = [bundle / name for name in read_bundle(bundle, check_hashes=False).manifest.files]
    _start(bundle, picture)
    replies: dict[str, list[dict[str, Any]]] = {case: [] for case in CASES}
    for _ in range(rounds):
        for case, options in CASES.items():
            if case == ON_DISK:
                forget(files)
            replies[case].append(_start(bundle, picture, **options))
    bare = _start(bundle, picture, prepack=False)
    return {
        "files": sum(path.stat().st_size for path in files),
        "cases": {case: _summary(of_case) for case, of_case in replies.items()},
        "sessions without prepacking": {
            name: sum(values) for name, values in bare["samples"][""].items() if name.startswith("session of")
        },
    }


def _start(bundle: Path, picture: Path, *, check: bool = False, prepack: bool = True) -> dict[str, Any]:
    spec = {"bundle": str(bundle), "picture": str(picture), "question": QUESTION}
    command = [
        sys.executable,
        "-m",
        "benchmarks.starting",
        json.dumps(spec | {"check": check, "prepack": prepack}),
    ]
    reply: dict[str, Any] = json.loads(run_command(command)[0].splitlines()[-1])
    return reply


def _summary(replies: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over processes; a stage that came several times in one is their sum."""
    replies = [*replies]
    stages = {
        name: [sum(reply["samples"][""][name]) for reply in replies] for name in replies[0]["samples"][""]
    }
    return {
        "stages": {name: timing(values) for name, values in stages.items()},
        "cpu seconds": {name: timing([reply["cpu"][name] for reply in replies]) for name in (PREFILL, TOKEN)},
        "peak bytes": {name: max(reply["memory"][name] for reply in replies) for name in (PREFILL, TOKEN)},
    }


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown: the bars, then where the time goes."""
    lines = [
        f"Random weights at the real shapes, `--preset cpu`, {LLAVA_7B.words} asked about 336 × 336 pixels and "
        f"{QWEN_3B.words} about 672 × 672. Until the prefill: Python, opening, encoding and selecting. Memory is the "
        "peak, mapped files with it.\n",
        "| | files | at most | | until the prefill | at most | processor time | memory | of it beside the files "
        "| at most | to the first token |",
        "|---" * 11 + "|",
    ]
    for name, of_bundle in result.items():
        size = of_bundle["files"]
        for case, found in of_bundle["cases"].items():
            stages, peak = found["stages"], found["peak bytes"][TOKEN]
            bars = (
                [f"{of_bundle['most seconds']:g} s", f"{MEMORY / 1e9:.1f} GB"] if case == WARM else ["", ""]
            )
            cells = [
                f"{name} | {size / 1e9:.2f} GB | {of_bundle['most bytes'] / 1e9:.1f} GB",
                f"{case} | {_seconds(stages[PREFILL])} | {bars[0]}",
                f"{found['cpu seconds'][PREFILL].median:.1f} s | {peak / 1e9:.2f} GB | {(peak - size) / 1e9:.2f} GB",
                f"{bars[1]} | {_seconds(stages[TOKEN])}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    names = [*dict.fromkeys(name for one in result.values() for name in one["cases"][WARM]["stages"])]
    names = [name for name in names if name not in (PREFILL, TOKEN)]
    lines += ["", f"Stages, {WARM}, in seconds; sessions open at once.\n", f"| | {' | '.join(names)} |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for name, of_bundle in result.items():
        stages, bare = of_bundle["cases"][WARM]["stages"], of_bundle["sessions without prepacking"]
        cells = [
            (f"{stages[stage].median / 1e3:.2f}" if stage in stages else "")
            + (f" ({bare[stage] / 1e3:.2f} without prepacking)" if stage in bare else "")
            for stage in names
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _seconds(one: Timing) -> str:
    return f"{one.median / 1e3:.1f} ({one.low / 1e3:.1f}–{one.high / 1e3:.1f}) s"
