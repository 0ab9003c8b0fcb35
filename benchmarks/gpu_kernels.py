"""The kernel on a CUDA GPU: are its picks right, how long does it take, and how long does what it replaces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from benchmarks.measure import Timing, take_turns
from resprune.exporter.verify.reference import picks_within_rounding, residual_select, text_gain
from resprune.graphs import token_select_model
from resprune.method import Selection
from tests.vectors import CASES

SIZES = ((576, 64, 4096, 0.25), (2880, 320, 4096, 1.0))
"""Tokens, K, hidden size, and the milliseconds that an H100 should need at most."""
RANDOM = (
    (1, 576, 64, 4096),
    (3, 577, 33, 1152),
    (2, 1000, 50, 3584),
    (200, 144, 16, 128),
    (1, 2880, 320, 4096),
)
"""Pictures, tokens, K, hidden size: full and odd, and more images than the GPU has multiprocessors."""
CALLS = 20
"""In a row for each timing, so that the GPU and not Python is what is timed."""


def run() -> dict[str, Any]:
    """Check, then time; {"skipped": why} where there is no CUDA GPU or no Triton."""
    if not torch.cuda.is_available():
        return {"skipped": "PyTorch sees no CUDA GPU"}
    try:
        import triton
    except ImportError:
        return {"skipped": "Triton is not installed: pip install 'resprune[kernels]'"}
    device = torch.device("cuda")
    versions = {"torch": torch.__version__, "triton": triton.__version__, "onnxruntime": ort.__version__}
    return {
        "device": torch.cuda.get_device_name(device),
        "versions": versions,
        "vectors": check_vectors(device),
        "random": check_random(device),
        "milliseconds": {f"N {N} K {k} D {D}": measure(device, N, k, D, bar) for N, k, D, bar in SIZES},
    }


def check_vectors(device: torch.device) -> dict[str, bool]:
    """Which of the float64 cases the kernel picks to the index."""
    from resprune.graphs.kernels.selection import residual_select as kernel

    right = {}
    for case in CASES:
        visual, text, text_mask, token_mask = (torch.from_numpy(a).to(device) for a in case.inputs())
        gain = text_gain(visual, text, text_mask, token_mask, alpha=case.alpha, scale=case.scale)
        picks = kernel(visual, gain, case.k, token_mask)[0].cpu().numpy()
        right[case.name] = bool(np.array_equal(picks, case.arrays["pick_order"]))
    return right


def check_random(
    device: torch.device, sizes: tuple[tuple[int, int, int, int], ...] = RANDOM
) -> dict[str, dict[str, Any]]:
    """Share of the picks that are the reference's, and whether all are the best that float32 can tell."""
    from resprune.graphs.kernels.selection import residual_select as kernel

    found = {}
    for pictures, N, k, D in sizes:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            visual, gain, token_mask = inputs(device, pictures, N, D, dtype)
            picks = kernel(visual, gain, k, token_mask)
            expected = residual_select(visual, gain, k, token_mask)
            within = picks_within_rounding(visual, gain, picks, token_mask)
            found[f"{pictures} × N {N} K {k} D {D} {str(dtype).removeprefix('torch.')}"] = {
                "equal": float((picks == expected).float().mean()),
                "within rounding": bool(within.all()),
            }
    return found


def inputs(
    device: torch.device, pictures: int, N: int, D: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Visual tokens of unequal length, a gain, and a mask that leaves out a few of all pictures but the first."""
    generator = torch.Generator(device).manual_seed(N + D)
    visual = torch.randn(pictures, N, D, generator=generator, device=device)
    visual *= torch.rand(pictures, N, 1, generator=generator, device=device) + 0.5
    gain = torch.rand(pictures, N, generator=generator, device=device)
    token_mask = torch.rand(pictures, N, generator=generator, device=device) > 0.1
    token_mask[0] = True
    return visual.to(dtype), gain, token_mask


def measure(device: torch.device, N: int, k: int, D: int, bar: float, calls: int = CALLS) -> dict[str, Any]:
    """Milliseconds of one selection: the kernel, the reference's loop, and the ONNX function; and the bar."""
    from resprune.graphs.kernels.selection import residual_select as kernel

    def repeated(call: Callable[[], object], times: int) -> Callable[[], None]:
        def timed() -> None:
            for _ in range(times):
                call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return timed

    visual, gain, token_mask = inputs(device, 1, N, D, torch.float32)
    half = visual.half()
    one_by_one: dict[str, Callable[[], object]] = {
        "kernel, float32": lambda: kernel(visual, gain, k, token_mask),
        "kernel, float16": lambda: kernel(half, gain, k, token_mask),
    }
    slow: dict[str, Callable[[], object]] = {
        "PyTorch loop": lambda: residual_select(visual, gain, k, token_mask)
    }
    missing = None
    if "CUDAExecutionProvider" in ort.get_available_providers():
        for body in ("loop", "unrolled"):
            slow[f"ONNX Runtime CUDA, selector, {body}"] = onnx_call(visual, k, body)
    else:
        missing = "this ONNX Runtime has no CUDA provider: pip install onnxruntime-gpu"
    turns = {name: repeated(call, calls) for name, call in one_by_one.items()}
    turns |= {name: repeated(call, 1) for name, call in slow.items()}
    timings = take_turns(turns, repeats=11, warm_up=2)
    for name in one_by_one:
        timing: Timing = timings[name]
        timings[name] = replace(
            timing, median=timing.median / calls, low=timing.low / calls, high=timing.high / calls
        )
    return {
        "timings": timings,
        "onnxruntime": missing,
        "bar": bar,
        "met": {name: timings[name].median <= bar for name in one_by_one},
    }


def onnx_call(visual: Tensor, k: int, body: str) -> Callable[[], None]:
    """The stand-alone selector in ONNX Runtime's CUDA provider: all inputs and outputs stay on the GPU."""
    session = ort.InferenceSession(
        token_select_model(Selection(k=k, body=body)).SerializeToString(),
        providers=["CUDAExecutionProvider"],
    )
    B, N, D = visual.shape
    feed = {
        "image_features": visual.cpu().numpy(),
        "token_mask": np.ones((B, N), dtype=bool),
        "text_embeds": np.ones((B, 4, D), dtype=np.float32),
        "text_mask": np.ones((B, 4), dtype=bool),
    }
    binding = session.io_binding()
    for name, value in feed.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value, "cuda", 0))
    for output in session.get_outputs():
        binding.bind_output(output.name, "cuda")
    return lambda: session.run_with_iobinding(binding)
