"""The GPU check: skipped without a GPU, and with one a record of every part, whatever becomes of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_check, gpu_kernels
from resprune.runtime.backends.cuda import Gpu
from tests.runtime.gpu_stand_in import FLAVOUR, Cuda, TensorRT, with_engines

ROOT = Path(__file__).parent.parent.parent
GPU = Gpu("Stand-in 4090 (Ti)", (8, 6), (13, 0), 128)


def test_without_a_gpu_it_is_skipped() -> None:
    hidden = [sys.executable, "-c", "from benchmarks import gpu_check; raise SystemExit(gpu_check.main())"]
    done = subprocess.run(
        hidden, cwd=ROOT, env={"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("gpu-check skipped: there is no GPU that CUDA can use here")
    assert "$(BIN)/python -m benchmarks.gpu_check" in (ROOT / "Makefile").read_text()


def fail() -> None:
    raise ValueError("it broke")


def skip() -> None:
    raise gpu_check.Skipped("it is not there")


@pytest.mark.parametrize(
    ("wanted", "status"), [({"good": dict, "absent": skip}, 0), ({"bad": fail, "good": dict}, 1)]
)
def test_every_part_is_recorded(
    wanted: dict[str, Callable[[], Any]], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "gpu_at_hand", lambda: GPU)
    monkeypatch.setattr(gpu_check, "demo_bundle", lambda work: work)
    monkeypatch.setattr(gpu_check, "parts", lambda bundle: wanted)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path)
    assert gpu_check.main() == status
    record = json.loads((tmp_path / "gpu-stand-in-4090-ti.json").read_text())
    assert record["gpu"] == {
        "name": GPU.name,
        "capability": [8, 6],
        "driver": [13, 0],
        "processors": 128,
    }
    assert record["machine"]["versions"]["onnxruntime"]
    assert {name: part["status"] for name, part in record["parts"].items()} == {
        name: {fail: "failed", skip: "skipped", dict: "passed"}[part] for name, part in wanted.items()
    }
    for part in record["parts"].values():
        assert part["status"] == "passed" or part["reason"]


def test_what_cannot_be_tried_is_skipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_kernels, "run", lambda: {"skipped": "PyTorch sees no CUDA GPU"})
    monkeypatch.setattr(gpu_check.onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(gpu_check, "installed_flavours", list)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setattr(gpu_check, "gpu_tests", dict)
    parts = gpu_check.check(GPU, gpu_check.parts(tmp_path))["parts"]
    assert {name: part["status"] for name, part in parts.items()} == {
        "kernels": "skipped",
        "onnxruntime on CUDA": "skipped",
        "tensorrt-rtx engines": "skipped",
        "tests that need a GPU": "passed",
    }


def test_wrong_picks_do_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {
        "vectors": {"plain": True, "duplicates": False},
        "random": {
            "1 × N 576 float16": {"equal": 0.9, "within rounding": True},
            "3 × N 577 float32": {"equal": 0.9, "within rounding": False},
        },
    }
    monkeypatch.setattr(gpu_kernels, "run", lambda: found)
    part = gpu_check.check(GPU, {"kernels": gpu_check.kernels})["parts"]["kernels"]
    assert part["status"] == "failed"
    assert part["reason"] == "the kernel's picks are wrong: duplicates, 3 × N 577 float32"
    found["vectors"]["duplicates"] = found["random"]["3 × N 577 float32"]["within rounding"] = True
    assert gpu_check.check(GPU, {"kernels": gpu_check.kernels})["parts"]["kernels"]["status"] == "passed"


def test_the_engines_part_compares_answers(
    demo_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On the stand-in: a selection that differs in one place does not pass."""
    root = Path(shutil.copytree(demo_bundle, tmp_path / "demo"))
    cuda = Cuda()
    trt = TensorRT(cuda)
    monkeypatch.setattr("resprune.runtime.backends.cuda._runtime", lambda: cuda)
    monkeypatch.setattr("resprune.runtime.backends.tensorrt.tensorrt_module", lambda flavour: trt)
    monkeypatch.setattr("resprune.exporter.tensorrt.engines.build", lambda root, flavour: with_engines(root))
    figures = gpu_check.engines(root, FLAVOUR)
    assert figures["questions answered alike"] >= 5
    assert figures["first token, milliseconds"].keys() == {"GPU", "CPU"}
    calls = iter([{"images": [], "token_ids": [1]}, {"images": [], "token_ids": [2]}])

    class Other:
        def describe(self) -> dict[str, Any]:
            return next(calls)

    monkeypatch.setattr(gpu_check.Pipeline, "ask", lambda *arguments, **options: Other())
    with pytest.raises(AssertionError, match="token_ids differ"):
        gpu_check.answers(root)
