"""TensorRT engines at real shapes: how long TensorRT-RTX takes to build them on a processor, and how large they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.checkpoints import write_llava15_slice, write_qwen25vl_vision
from benchmarks.measure import RESPRUNE, exported
from benchmarks.measure import run as run_command
from resprune.runtime.bundle.files import read_bundle

TARGET = "sm_86"
# Name of the bundle → what writes its checkpoint, how it is exported, and what its graphs are called in the table.
CASES: dict[str, tuple[Any, list[str], dict[str, str]]] = {
    "llava15-slice": (
        write_llava15_slice,
        ["-k", "64"],
        {
            "vision_select": "CLIP-L/336, projector and selection, K 64 of 576",
            "decoder_model_merged": "two of the 32 layers of a 7B Llama, KV cache, prefill and decode",
        },
    ),
    "qwen25vl-vision": (
        write_qwen25vl_vision,
        ["-k", "11.1%", "--max-pixels", str(1296 * 28 * 28)],
        {
            "vision_select": "8 of the 32 blocks of Qwen2.5-VL's tower and selection, any grid up to 1,296 tokens"
        },
    ),
}


def run(work: Path) -> dict[str, Any]:
    """Export in half precision, then build every graph's engine in a child process."""
    engines: dict[str, Any] = {}
    peaks: dict[str, float] = {}
    for name, (write, options, titles) in CASES.items():
        checkpoint, bundle = work / name, work / f"{name}-fp16"
        if not checkpoint.exists():
            write(checkpoint)
        exported(checkpoint, bundle, "--dtype", "fp16", *options)
        printed, _, peaks[name] = run_command([*RESPRUNE, "build", str(bundle), "--target", TARGET])
        manifest = read_bundle(bundle, check_hashes=False).manifest
        built = manifest.engines[f"tensorrt-rtx-{TARGET}"].graphs
        for line in printed.splitlines():
            file, seconds, *_ = line.replace(",", "").split()
            graph = Path(file).stem
            if graph in titles:
                onnx = sum(path.stat().st_size for path in (bundle / "onnx").glob(f"{graph}_fp16.onnx*"))
                engines[titles[graph]] = {
                    "seconds": float(seconds),
                    "megabytes": manifest.files[built[graph].file].size / 1e6,
                    "graph, megabytes": onnx / 1e6,
                }
    return {
        "target": TARGET,
        "versions": built["vision_select"].versions,
        "engines": engines,
        "peak megabytes": peaks,
    }


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    versions = ", ".join(f"{name} {value}" for name, value in result["versions"].items())
    rows = [
        f"Built for {result['target']} by {versions}, fp16, on the processor alone; at most "
        f"{max(result['peak megabytes'].values()):,.0f} MiB resident.",
        "",
        "| | graph | built in | engine |",
        "|---|---|---|---|",
    ]
    for title, figures in result["engines"].items():
        rows.append(
            f"| {title} | {figures['graph, megabytes']:,.0f} MB | {figures['seconds']:.1f} s "
            f"| {figures['megabytes']:,.0f} MB |"
        )
    return "\n".join(rows)
