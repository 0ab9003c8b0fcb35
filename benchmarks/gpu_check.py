"""`make gpu-check`: everything that only a GPU can judge, on a machine with one, in one JSON file.

Without a GPU it says so, and that is no failure. A part that cannot be tried there is recorded with the reason.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import onnxruntime

from benchmarks.measure import machine, plain, take_turns
from resprune import Pipeline, ResPruneError
from resprune.runtime.backends.cuda import Gpu, gpu_at_hand
from resprune.runtime.backends.engines import installed_flavours, tensorrt_module

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PICTURES = ROOT / "demo" / "pictures"
TOKENS = 16


class Skipped(Exception):  # noqa: N818 - it is no error
    """A part that cannot be tried on this machine, and why."""


def main() -> int:
    """Run every part that can be; 1 if one of them failed, else 0."""
    try:
        gpu = gpu_at_hand()
    except ResPruneError as error:
        print(f"gpu-check skipped: {error}")
        return 0
    with tempfile.TemporaryDirectory() as work:
        record = check(gpu, parts(demo_bundle(Path(work))))
    path = RESULTS / f"gpu-{re.sub(r'[^a-z0-9]+', '-', gpu.name.lower()).strip('-')}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {path.relative_to(ROOT)}")
    return int(any(part["status"] == "failed" for part in record["parts"].values()))


def demo_bundle(work: Path) -> Path:
    """The demo model's bundle, exported anew."""
    # PyTorch, which a machine without a GPU need not load.
    from resprune.exporter.export import export
    from resprune.exporter.options import Options

    return export("demo", work / "demo", Options(k=TOKENS, split=True, positions="original"))


def parts(bundle: Path) -> dict[str, Callable[[], Any]]:
    """What is checked, by name, on the demo `bundle`."""
    made: dict[str, Callable[[], Any]] = {
        "kernels": kernels,
        "onnxruntime on CUDA": lambda: on_cuda(bundle),
    }
    for flavour in installed_flavours() or ["tensorrt-rtx"]:
        made[f"{flavour} engines"] = lambda flavour=flavour: engines(bundle, flavour)
    made["tests that need a GPU"] = gpu_tests
    return made


def check(gpu: Gpu, wanted: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Run the parts one after another, whatever becomes of one; returns the record that is written down."""
    record: dict[str, Any] = {
        "gpu": asdict(gpu),
        "machine": machine(),
        "system": platform.platform(),
        "parts": {},
    }
    for name, part in wanted.items():
        start = perf_counter()
        try:
            entry = {"status": "passed", "figures": plain(part())}
        except Skipped as error:
            entry = {"status": "skipped", "reason": str(error)}
        except Exception as error:  # whatever a driver or a library raises is what is to be recorded
            traceback.print_exc()
            entry = {"status": "failed", "reason": str(error)}
        entry["seconds"] = round(perf_counter() - start, 1)
        record["parts"][name] = entry
        print(
            f"{name:28} {entry['status']:>8} {entry['seconds']:>8} s   {entry.get('reason', '')}", flush=True
        )
    return record


def kernels() -> Any:
    """The kernel's own check, which times it as well: its picks must be the reference's, or as good."""
    from benchmarks import gpu_kernels  # PyTorch

    figures = gpu_kernels.run()
    if "skipped" in figures:
        raise Skipped(figures["skipped"])
    wrong = [name for name, right in figures["vectors"].items() if not right]
    wrong += [name for name, case in figures["random"].items() if not case["within rounding"]]
    if wrong:
        raise AssertionError(f"the kernel's picks are wrong: {', '.join(wrong)}")
    return figures


def on_cuda(bundle: Path) -> dict[str, Any]:
    """The demo's answers in ONNX Runtime's CUDA provider."""
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise Skipped("onnxruntime has no CUDAExecutionProvider; pip install onnxruntime-gpu takes its place")
    return answers(bundle, providers=["cuda"])


def engines(bundle: Path, flavour: str) -> dict[str, Any]:
    """Build the demo's engines for the GPU at hand, and answer from them."""
    try:
        version = tensorrt_module(flavour).__version__
    except ResPruneError as error:
        raise Skipped(str(error)) from None
    from resprune.exporter.tensorrt.engines import build

    start = perf_counter()
    build(bundle, flavour)
    return {"version": version, "build, seconds": perf_counter() - start, **answers(bundle, engines=flavour)}


def answers(bundle: Path, **where: Any) -> dict[str, Any]:
    """The demo's sample questions there and in ONNX Runtime on the CPU: picks and tokens must be the same."""
    asked = json.loads((PICTURES / "questions.json").read_text())
    with Pipeline.load(bundle) as cpu, Pipeline.load(bundle, **where) as gpu:
        for entry in asked:
            picture = PICTURES / entry["image"]
            ours, theirs = (pipeline.ask(picture, entry["question"]).describe() for pipeline in (gpu, cpu))
            for what in ("images", "token_ids"):
                if ours[what] != theirs[what]:
                    raise AssertionError(
                        f"{entry['question']} ({entry['image']}): {what} differ from the CPU's"
                    )
        picture, question = PICTURES / asked[0]["image"], asked[0]["question"]
        timings = take_turns(
            {
                name: lambda pipeline=pipeline: pipeline.ask(
                    picture, question, max_new_tokens=1, stream=False
                )
                for name, pipeline in (("GPU", gpu), ("CPU", cpu))
            },
            repeats=21,
            warm_up=3,
        )
    return {"questions answered alike": len(asked), "first token, milliseconds": timings}


def gpu_tests() -> str:
    """The tests marked `gpu`; the last line of pytest's."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(done.stdout[-2000:])
    return done.stdout.strip().splitlines()[-1]


if __name__ == "__main__":
    sys.exit(main())
