"""Exports of checkpoints of real size, and their peak memory, beside copying the same bytes on the same disk."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from time import perf_counter, sleep
from typing import Any

from benchmarks.checkpoints import write_llava15_7b, write_qwen25vl_3b
from benchmarks.measure import RESPRUNE
from benchmarks.shapes import write_picture

Writer = Callable[[Path], None]
CHECKPOINTS: dict[str, tuple[Writer, str, float]] = {
    "llava15-7b": (write_llava15_7b, "64", 14.2e9),
    "qwen25vl-3b": (write_qwen25vl_3b, "11%", 7.6e9),
}
DTYPE = "fp16"
BAR = 4.0
"""An export should take at most so many times what copying takes."""
QUESTION = "What is on the table?"
PICTURE = (1024, 768)
"""Width and height: 999 tokens of a Qwen2.5-VL; LLaVA-1.5 makes 336 × 336 of it."""
TOKENS = 4
ASKED = "q4"
"""What is asked: half precision is widened by ONNX Runtime on a CPU, to three times the checkpoint's bytes."""


def run(work: Path) -> dict[str, Any]:
    """Write, copy, export and ask each; everything is removed again. Left out where the disk is too small."""
    return {name: measure(name, CHECKPOINTS, work) for name in CHECKPOINTS}


def measure(name: str, checkpoints: Mapping[str, tuple[Writer, str, float]], work: Path) -> dict[str, Any]:
    """Write one of `checkpoints`, each with its K and its bytes; copy, export and ask it."""
    write, k, size = checkpoints[name]
    picture = work / "export-size.png"
    write_picture(PICTURE, picture)
    needed, free = 2.6 * size, shutil.disk_usage(work).free
    if free < needed:
        return {"skipped": f"needs {needed / 1e9:.0f} GB of disk, and {free / 1e9:.0f} GB are free"}
    checkpoint, copy, bundle = (work / f"{name}{suffix}" for suffix in ("", "-copy", f"-{DTYPE}"))
    try:
        if not checkpoint.exists():
            write(checkpoint)
        weights = sorted(checkpoint.glob("*.safetensors"))
        options = [str(checkpoint), str(bundle), "-k", k, "--verify", "layers", "--force"]
        before = _copy(weights, copy)
        forget(weights)
        exporting = watch([*RESPRUNE, "export", *options, "--dtype", DTYPE])
        sizes = [_size(bundle)]
        shutil.rmtree(bundle, ignore_errors=True)
        copying = [before, _copy(weights, copy)]
        forget(weights)
        quantizing = watch([*RESPRUNE, "export", *options, "--dtype", ASKED, "--optimize", "ort"])
        sizes.append(_size(bundle))
        ask = [
            *RESPRUNE,
            "ask",
            str(bundle),
            str(picture),
            QUESTION,
            "--max-new-tokens",
            str(TOKENS),
            "--json",
        ]
        ratios = [exporting["seconds"] / seconds for seconds in (mean(copying), max(copying), min(copying))]
        return {
            "bytes": sum(path.stat().st_size for path in weights),
            "picture": PICTURE,
            "bundle_bytes": sizes,
            "copy_seconds": copying,
            "export": exporting,
            "ratio": dict(zip(("mean", "low", "high"), ratios, strict=True)),
            "bar": BAR,
            "met": exporting["status"] == 0 and ratios[0] <= BAR,
            "quantized": quantizing,
            "ask": watch(ask),
        }
    finally:
        for folder in (checkpoint, copy, bundle):
            shutil.rmtree(folder, ignore_errors=True)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _copy(files: Sequence[Path], target: Path) -> float:
    """Seconds for `cp` of the files from the disk, flushed to the disk as an export is; the copy is removed again."""
    forget(files)
    target.mkdir()
    started = perf_counter()
    subprocess.run(["cp", *map(str, files), str(target)], check=True)
    for path in target.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    seconds = perf_counter() - started
    shutil.rmtree(target)
    return seconds


def forget(files: Sequence[Path]) -> None:
    """Drop the files from the system's cache, so that whoever comes next reads them from the disk."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # what is not on the disk yet is not dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def watch(command: Sequence[str]) -> dict[str, Any]:
    """Run a command: its seconds, its stages' seconds, and the peak of its processes' resident memory together."""
    started, peak, before = perf_counter(), 0, os.times()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while process.poll() is None:
            peak = max(peak, _resident(process.pid))
            sleep(0.05)
        assert process.stdout is not None
        told = process.stdout.read()
    stages = re.findall(r"^\[\d+/\d+\] (\S+) +([\d.]+) s(.*)$", told, re.MULTILINE)
    return {
        "seconds": perf_counter() - started,
        "cpu_seconds": sum(os.times()[2:4]) - sum(before[2:4]),
        "peak_bytes": peak,
        "status": process.returncode,
        "stages": {Path(stage).name: float(seconds) for stage, seconds, _ in stages},
        "told": told.splitlines()[-12:],
    }


def _resident(root: int) -> int:
    """Bytes of resident memory of a process and its descendants, shared pages counted for each."""
    parents, resident = {}, {}
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split() if entry.name.isdigit() else []
        except OSError:  # it has ended
            continue
        if fields:
            parents[int(entry.name)] = int(fields[1])
            resident[int(entry.name)] = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    family = {root}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(resident.get(process, 0) for process in family)


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    rows = [
        f"| checkpoint | copied before, after | exported | of copying | at most {BAR:g} × | processor time "
        "| peak memory | bundle | exported in 4 bits | asked | bundle in 4 bits |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for name, figures in result.items():
        if "skipped" in figures:
            notes.append(f"{name} was left out: it {figures['skipped']}.")
            continue
        export, ask, ratio = figures["export"], figures["ask"], figures["ratio"]
        exported = f"{export['seconds']:.0f} s" if export["status"] == 0 else f"status {export['status']}"
        answered = [
            f"{run['seconds']:.0f} s, {run['peak_bytes'] / 1e9:.1f} GB"
            if run["status"] == 0
            else f"status {run['status']} at {run['peak_bytes'] / 1e9:.1f} GB"
            for run in (figures["quantized"], ask)
        ]
        halved, quantized = (f"{size / 1e9:.1f} GB" for size in figures["bundle_bytes"])
        cells = (
            f"{name}, {figures['bytes'] / 1e9:.1f} GB",
            ", ".join(f"{seconds:.0f} s" for seconds in figures["copy_seconds"]),
            exported,
            f"{ratio['mean']:.2f} × ({ratio['low']:.2f}–{ratio['high']:.2f})",
            "met" if figures["met"] else "missed",
            f"{export['cpu_seconds']:.0f} s",
            f"{export['peak_bytes'] / 1e9:.1f} GB",
            halved,
            *answered,
            quantized,
        )
        rows.append(f"| {' | '.join(cells)} |")
        stages = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in export["stages"].items())
        notes.append(f"{name}: {stages}.")
    return (
        f"`--dtype {DTYPE} --verify layers`, random weights at the real shapes; copied is `cp` and fsync of the same "
        "bytes on the same disk, once before the export and once after it; of copying is against the mean of the two, "
        "in brackets against each; all read the checkpoint from the disk, not from the system's cache. "
        "Peak memory is that of all processes of the export together, with mapped files. "
        f"What is asked, for {TOKENS} tokens about an image of {PICTURE[0]:,} × {PICTURE[1]} pixels, is exported once "
        f"more, with `--dtype {ASKED} --optimize ort`.\n\n" + "\n".join(rows) + "\n\n" + "\n\n".join(notes)
    )
