"""The kernel compiled ahead of time, on a machine that needs no GPU, for one GPU architecture."""

from __future__ import annotations

import re
from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from resprune.elements import ELEMENTS, FLOATS
from resprune.graphs.kernels.residual_select import residual_select
from resprune.graphs.kernels.selection import OPTIONS, constants

CAPABILITIES = (80, 86, 87, 89, 90, 120)
"""The architectures that the tests compile for: A100, GeForce 30, Orin, GeForce 40 and L4, H100, GeForce 50."""

PTX_VERSION = 87
"""8.7, of CUDA 12.8: it knows compute capability 12.0, and older drivers know it than what Triton would write."""

SHARED_MEMORY = 48 * 1024
"""Bytes that a launch gets without asking for more, on every architecture."""


@dataclass(frozen=True)
class CompiledKernel:
    """What a launch needs: the entry's name, PTX with the kernel's own parameters only, a cubin with Triton's two more.

    `threads` is of one program, `shared_memory` its dynamic shared memory in bytes. `ttgir` is the compiler's last form
    in which the products are still seen as such.
    """

    name: str
    ptx: str
    cubin: bytes
    ttgir: str
    threads: int
    shared_memory: int


def compile_residual_select(capability: int, *, hidden_size: int, k: int, dtype: str) -> CompiledKernel:
    """Compile for compute capability `capability` (87 is 8.7), and for this hidden size, k and dtype of the tokens.

    Raises:
        ValueError: a dtype that is none of FLOATS.
        RuntimeError: a Triton whose kernels need what only its own launcher brings.

    """
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be one of {', '.join(FLOATS)}, got {dtype!r}")
    chosen = constants(hidden_size, k, dtype)
    signature = {
        "visual": f"*{ELEMENTS[dtype].triton}",
        "gain": "*fp32",
        "token_mask": "*i1",
        "num_tokens": "i32",
        "first_step": "i32",
        "last_step": "i32",
        "pick_order": "*i64",
        "scratch": "*fp32",
    }
    # Buffers of any runtime are aligned to far more; without this the loads would be of single elements.
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    source = ASTSource(
        residual_select, signature | dict.fromkeys(chosen, "constexpr"), constexprs=chosen, attrs=aligned
    )
    target = GPUTarget("cuda", capability, 32)
    for stages in (OPTIONS["num_stages"], 2):  # fewer where the loads that are under way would need too much
        options = {**OPTIONS, "num_stages": stages, "ptx_version": PTX_VERSION}
        compiled = triton.compile(source, target=target, options=options)
        meta = compiled.metadata
        if meta.shared <= SHARED_MEMORY:
            break
    if meta.global_scratch_size or meta.profile_scratch_size or meta.shared > SHARED_MEMORY:
        raise RuntimeError(
            f"Triton {triton.__version__} gave the kernel {meta.shared} bytes of shared memory, and "
            f"{meta.global_scratch_size + meta.profile_scratch_size} of scratch: launched by others it has "
            f"{SHARED_MEMORY} and none"
        )
    return CompiledKernel(
        meta.name,
        own_parameters(compiled.asm["ptx"], len(signature)),
        compiled.asm["cubin"],
        compiled.asm["ttgir"],
        meta.num_warps * meta.warp_size,
        meta.shared,
    )


def own_parameters(ptx: str, count: int) -> str:
    """PTX whose entry takes its first `count` parameters only.

    Triton (3.8, 3.9) appends two pointers, for scratch that this kernel does not use. Its own launcher passes them;
    another one, such as TensorRT's, knows nothing of them.

    Raises:
        RuntimeError: a parameter that would go is read, or there are fewer than `count`.

    """
    entry = re.search(r"\.visible \.entry \w+\(\s*(.*?)\s*\)", ptx, re.DOTALL)
    parameters = entry.group(1).split(",\n") if entry else []
    dropped = [parameter.split()[-1] for parameter in parameters[count:]]
    if entry is None or len(parameters) < count or any(f"[{name}]" in ptx for name in dropped):
        raise RuntimeError(f"Triton {triton.__version__} writes PTX in another form")
    return ptx[: entry.start(1)] + ",\n".join(parameters[:count]) + ptx[entry.end(1) :]
