"""`residual_select` for PyTorch tensors on a CUDA GPU, and what any launch of the kernel needs to know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resprune.elements import FLOATS
from resprune.graphs.kernels import residual_select as kernel

MAX_TOKENS = 32_768
"""Of an image: what MAX_BLOCKS blocks of TOKENS hold."""

MAX_PROGRAMS = int(kernel.MAX_PROGRAMS.value)
"""Of an image: what the kernel's first barrier has room for."""

OPTIONS = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
"""For the compiler."""


def constants(hidden_size: int, k: int, dtype: str) -> dict[str, int | str]:
    """The kernel's compile-time arguments for visual tokens of this size and dtype, one of FLOATS."""
    full = dtype == "float32"
    return {
        "D": hidden_size,
        "K": k,
        "TILE": 64,
        "DEPTH": 32 if full or hidden_size <= 64 else 64,
        "TOKENS": 32,
        "STEPS": 64,
        "PRECISION": "tf32x3" if full else "tf32",
    }


def scratch_words(num_tokens: Any, k: int) -> Any:
    """float32 words an image: header, greetings and answers, tops [2, blocks], then [N] rows and [N, K] and [N, N].

    The rows are energy [2, N], score [2, N] and fill [N]; L is [N, K] and G is [N, N]. `num_tokens` is an int, or an
    expression of TensorRT's, and so is the result.
    """
    fixed = kernel.HEADER.value + 2 * kernel.MAX_PROGRAMS.value + 2 * kernel.MAX_BLOCKS.value
    return num_tokens * (num_tokens + (5 + k)) + fixed


def residual_select(
    visual: Tensor, gain: Tensor, k: int, token_mask: Tensor | None = None, *, programs: int | None = None
) -> Tensor:
    """Greedy choice of k tokens by gain times residual energy, in one launch.

    Args:
        visual: [B, N, D] visual tokens on a CUDA device, float32, float16 or bfloat16.
        gain: [B, N] from TextGain, as float32.
        k: tokens to keep per image.
        token_mask: [B, N] bool, False where a row is padding and may never be picked.
        programs: of an image; by default as many as the GPU can hold at the same time.

    Returns:
        [B, k] int64 token indices in the order picked, −1 where fewer than k rows are valid.

    Raises:
        ValueError: k below 1, more than MAX_TOKENS tokens, more than MAX_PROGRAMS programs, or another dtype.

    """
    B, N, D = visual.shape
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if N > MAX_TOKENS:
        raise ValueError(f"at most {MAX_TOKENS} tokens an image, got {N}")
    dtype = str(visual.dtype).removeprefix("torch.")
    if dtype not in FLOATS:
        raise ValueError(f"visual must be one of {', '.join(FLOATS)}, got {dtype}")
    if token_mask is None:
        token_mask = torch.ones((B, N), dtype=torch.bool, device=visual.device)
    if programs is None:
        programs = programs_of_an_image(processors(visual.device), B)
    if programs > MAX_PROGRAMS:
        raise ValueError(f"at most {MAX_PROGRAMS} programs an image, got {programs}")
    picks = torch.empty((B, k), dtype=torch.int64, device=visual.device)
    scratch = torch.empty((B, scratch_words(N, k)), dtype=torch.float32, device=visual.device)
    # Programs that wait for each other: a cooperative launch begins only when all of them fit.
    kernel.residual_select[(programs, B)](
        visual.contiguous(),
        gain.float().contiguous(),
        token_mask.contiguous(),
        N,
        0,
        k + 2,
        picks,
        scratch,
        **constants(D, k, dtype),
        **OPTIONS,
        launch_cooperative_grid=programs > 1,  # pyright: ignore[reportCallIssue] - Triton's launcher takes it
    )
    return picks


def programs_of_an_image(processors: int, images: int) -> int:
    """As many as fit when each of the GPU's multiprocessors holds one, at least one."""
    return max(1, min(MAX_PROGRAMS, processors // images))


def processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 1 for the CPU, where Triton's interpreter runs one program after the other."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1
