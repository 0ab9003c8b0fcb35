"""What `resprune inspect` prints."""

from collections.abc import Iterator
from typing import Any

from resprune.runtime.bundle.files import Bundle
from resprune.runtime.bundle.manifest import EngineSet, GraphSpec, Manifest, Range, TensorSpec

RUNTIMES = {"ort": "ONNX Runtime"}


def describe(bundle: Bundle) -> str:
    """Several lines on what a bundle holds: source, selection, graphs, parity, versions, sizes."""
    manifest = bundle.manifest
    selection = manifest.selection
    of = f" of {selection.num_tokens}" if selection.num_tokens else ""
    of += f" of up to {selection.max_tokens}" if selection.max_tokens else ""
    share = "" if selection.share is None else f", {100 * selection.share:g} % of its tokens"
    revision = "" if manifest.revision is None else f" at revision {manifest.revision}"
    total = sum(file.size for file in manifest.files.values())
    lines = [
        f"{bundle.root}: {manifest.family} bundle, format {manifest.format_version}, {_megabytes(total)}",
        f"  source      {manifest.model}{revision}",
        f"  made        {manifest.created} by {manifest.command}",
        f"  selection   keeps {selection.k}{of} tokens a picture{share}, alpha {selection.alpha:g}, "
        f"scale {selection.scale}, body {selection.body}, form {selection.form}",
        f"  positions   {manifest.positions}",
        f"  attention   {manifest.attention}",
        f"  context     {manifest.context_length} tokens; image token {manifest.image_token_id}",
        "graphs",
    ]
    if manifest.optimize:
        lines.insert(-1, f"  decoder     of operators that only {RUNTIMES[manifest.optimize]} has")
    for name, graph in manifest.graphs.items():
        lines.extend(_graph_lines(name, graph, manifest))
    if manifest.engines:
        lines.append("engines")
    for engines in manifest.engines.values():
        lines.extend(_engine_lines(engines, manifest))
    lines.append("parity with PyTorch, measured at export")
    lines.extend(_parity_lines(manifest.parity))
    lines.append("versions")
    lines.append("  " + ", ".join(f"{name} {value}" for name, value in manifest.versions.items()))
    return "\n".join(lines) + "\n"


def _graph_lines(name: str, graph: GraphSpec, manifest: Manifest) -> Iterator[str]:
    size = manifest.files[graph.file].size
    data = manifest.files.get(f"{graph.file}_data")
    yield f"  {name}  {graph.precision}, {_megabytes(size + (data.size if data else 0))}"
    for title, tensors in (("inputs", graph.inputs), ("outputs", graph.outputs)):
        yield f"    {title:<8}" + "; ".join(_tensors(tensors))


def _engine_lines(engines: EngineSet, manifest: Manifest) -> Iterator[str]:
    yield f"  {engines.flavour} for {engines.target}"
    for graph, engine in engines.graphs.items():
        versions = ", ".join(f"{name} {value}" for name, value in engine.versions.items())
        yield f"    {graph}  {_megabytes(manifest.files[engine.file].size)}, by {versions}"
        for profile in engine.profiles:
            yield "      " + ", ".join(_limits(axis, limits) for axis, limits in profile.items())


def _limits(axis: str, limits: Range) -> str:
    least, usual, most = limits
    return f"{axis} {least}" if least == most else f"{axis} {least} to {most} (usually {usual})"


def _tensors(tensors: tuple[TensorSpec, ...]) -> Iterator[str]:
    """Each tensor once; of the layers' keys and values the first pair stands for all."""
    layered = [tensor for tensor in tensors if tensor.name.startswith(("past_key_values.", "present."))]
    for tensor in tensors:
        if tensor not in layered[2:]:
            yield f"{tensor.name} {tensor.dtype}[{', '.join(map(str, tensor.shape))}]"
    if len(layered) > 2:
        yield f"… {len(layered)} in all"


def _parity_lines(figures: dict[str, Any], indent: str = "  ") -> Iterator[str]:
    for name, value in figures.items():
        if isinstance(value, dict) and any(isinstance(inner, dict) for inner in value.values()):
            yield f"{indent}{name}"
            yield from _parity_lines(value, indent + "  ")
        elif isinstance(value, dict):
            yield f"{indent}{name}  " + ", ".join(f"{key} {_figure(inner)}" for key, inner in value.items())
        else:
            yield f"{indent}{name}  {_figure(value)}"


def _figure(value: object) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
