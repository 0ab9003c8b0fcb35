"""What `resprune inspect` prints."""

import textwrap
from collections.abc import Iterator
from typing import Any

from resprune.runtime.bundle.files import Bundle
from resprune.runtime.bundle.manifest import EngineSet, GraphSpec, Manifest, Range, TensorSpec
from resprune.runtime.console import bytes_text

RUNTIMES = {"ort": "ONNX Runtime"}
WIDTH, INDENT = 80, 14
MOST_LINES = 2  # of one row of the summary


def summary(bundle: Bundle) -> str:
    """What a bundle is, on one screen: lines of at most 80 columns, two dozen of them at most."""
    manifest = bundle.manifest
    lines = [
        textwrap.shorten(f"{bundle.root}", WIDTH, placeholder="…"),
        *_row("family", f"{manifest.family}, bundle format {manifest.format_version}"),
        *_row("size", bytes_text(bundle.nbytes)),
    ]
    for name, value in _facts(manifest):
        lines += _row(name, value)
    graphs = [
        f"{name} {spec.precision} {_graph_size(spec, manifest)}" for name, spec in manifest.graphs.items()
    ]
    lines += _row("graphs", "; ".join(graphs), most=4)
    for engines in manifest.engines.values():
        size = sum(manifest.files[engine.file].size for engine in engines.graphs.values())
        lines += _row("engines", f"{engines.flavour} for {engines.target}, {bytes_text(size)}")
    lines += _row("parity", "; ".join(_parity_summary(manifest.parity)), most=4)
    lines += _row("made with", ", ".join(f"{name} {value}" for name, value in manifest.versions.items()))
    return "\n".join([*lines, "resprune inspect --all says the rest."]) + "\n"


def _facts(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Names and values: where it comes from, and what it does."""
    selection = manifest.selection
    of = f" of {selection.num_tokens}" if selection.num_tokens else ""
    of += f" of up to {selection.max_tokens}" if selection.max_tokens else ""
    share = "" if selection.share is None else f", {100 * selection.share:g} % of its tokens"
    revision = "" if manifest.revision is None else f" at revision {manifest.revision}"
    yield "source", f"{manifest.model}{revision}"
    yield "made", f"{manifest.created} by {manifest.command}"
    yield (
        "selection",
        f"keeps {selection.k}{of} tokens an image{share}, alpha {selection.alpha:g}, "
        f"scale {selection.scale}, body {selection.body}, form {selection.form}",
    )
    yield "positions", manifest.positions
    yield "attention", manifest.attention
    if manifest.early is not None:
        early = manifest.early
        share = "" if early.share is None else f", {100 * early.share:g} % of an image's,"
        yield (
            "early",
            f"{early.tokens} of {early.of} tokens{share} go on after {early.layer} blocks of the tower",
        )
    yield "context", f"{manifest.context_length} tokens; image token {manifest.image_token_id}"
    if not manifest.has_decoder:
        yield "decoder", "none: a GGUF file (--gguf), a server (--server) or an engine answers"
    if manifest.optimize:
        yield "decoder", f"of operators that only {RUNTIMES[manifest.optimize]} has"


def _row(name: str, value: str, most: int = MOST_LINES) -> list[str]:
    """`value` beside its name, in at most `most` lines."""
    lines = textwrap.wrap(
        value,
        WIDTH - INDENT,
        max_lines=most,
        placeholder=" …",
        break_on_hyphens=False,
    )
    return [f"  {name if number == 0 else '':<{INDENT - 2}}{line}" for number, line in enumerate(lines)]


def _parity_summary(parity: dict[str, Any]) -> Iterator[str]:
    """The counts, and of the outputs' differences the one that comes nearest to what it may be."""
    for name, value in parity.items():
        if not isinstance(value, dict):
            yield f"{name.replace('_', ' ')} {value}"
    found = [
        (figures["max_diff"] / max(figures["atol"], 1e-12), graph, output, figures)
        for graph, outputs in parity.get("outputs", {}).items()
        for output, figures in outputs.items()
        if isinstance(figures, dict)
        and all(isinstance(figures.get(name), float) for name in ("max_diff", "atol"))
    ]
    if found:
        _, graph, output, figures = max(found, key=lambda one: one[0])
        yield f"largest difference {_figure(figures['max_diff'])} ({graph}: {output})"


def _graph_size(graph: GraphSpec, manifest: Manifest) -> str:
    size = bytes_text(sum(manifest.files[file].size for file in graph.files()))
    sharing = [spec for spec in manifest.graphs.values() if spec.weights == graph.weights]
    return f"{size} (weights shared)" if graph.weights and len(sharing) > 1 else size


def describe(bundle: Bundle) -> str:
    """Several lines on what a bundle holds: source, selection, graphs, parity, versions, sizes."""
    manifest = bundle.manifest
    lines = [
        f"{bundle.root}: {manifest.family} bundle, format {manifest.format_version}, {bytes_text(bundle.nbytes)}",
        *(f"  {name:<{INDENT - 2}}{value}" for name, value in _facts(manifest)),
        "graphs",
    ]
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
    yield f"  {name}  {graph.precision}, {_graph_size(graph, manifest)}"
    for title, tensors in (("inputs", graph.inputs), ("outputs", graph.outputs)):
        yield f"    {title:<8}" + "; ".join(_tensors(tensors))


def _engine_lines(engines: EngineSet, manifest: Manifest) -> Iterator[str]:
    yield f"  {engines.flavour} for {engines.target}"
    for graph, engine in engines.graphs.items():
        versions = ", ".join(f"{name} {value}" for name, value in engine.versions.items())
        yield f"    {graph}  {bytes_text(manifest.files[engine.file].size)}, by {versions}"
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
