"""The selection's kernel in engines of classic TensorRT: its plugin, and the graph that the parser takes it from.

TensorRT-RTX has no plugins, and where the kernel cannot be had the graph's own function is built.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from functools import cache
from pathlib import Path

import onnx

from resprune.graphs.functions import RESIDUAL_SELECT
from resprune.runtime.backends.cuda import gpu_at_hand


def plugin_versions(graph: Path, flavour: str, num_tokens: int) -> tuple[dict[str, str], str]:
    """Versions, by package, of what brings the kernel into an engine of `graph` ({}: no kernel), and a note on it.

    `num_tokens` is the most visual tokens of an image. The plugin is registered with this process, for its GPU.
    """
    if flavour != "tensorrt":
        return {}, ""
    nodes = onnx.load(graph, load_external_data=False).graph.node
    if not any(node.op_type == RESIDUAL_SELECT for node in nodes):
        return {}, ""
    reason = _registered()
    if not reason:
        from resprune.graphs.kernels.selection import MAX_TOKENS

        if num_tokens > MAX_TOKENS:
            reason = f"the kernel takes {MAX_TOKENS:,} tokens, not {num_tokens:,}"
    if reason:
        return {}, f"selection by its function ({reason})"
    return {"triton": importlib.metadata.version("triton")}, "selection by its kernel"


def with_plugin(graph: Path, folder: Path) -> Path:
    """Write a copy of `graph` that calls the plugin, and its weights, into `folder`; returns the path of the copy."""
    from resprune.graphs.kernels.tensorrt_plugin import for_plugin

    changed = folder / graph.name
    model = onnx.load(graph, load_external_data=False)
    entries = (entry for tensor in model.graph.initializer for entry in tensor.external_data)
    for name in {entry.value for entry in entries if entry.key == "location"}:
        shutil.copyfile(graph.with_name(name), folder / name)  # onnx refuses links, hard ones too
    changed.write_bytes(for_plugin(model).SerializeToString())
    return changed


@cache
def _registered() -> str:
    """Register the plugin for the GPU at hand, once a process; returns why that cannot be, or nothing."""
    gpu = gpu_at_hand()
    try:
        from resprune.graphs.kernels.tensorrt_plugin import register

        register(capability=gpu.capability[0] * 10 + gpu.capability[1], processors=gpu.processors)
    except ImportError as error:
        return str(error)
    return ""
