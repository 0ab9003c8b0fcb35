"""What a written graph asks of a runtime: the operator sets of all its nodes."""

from collections.abc import Iterable, Iterator

import onnx
from onnx import NodeProto

from resprune.runtime.bundle.files import Bundle

PORTABLE = {"", "resprune"}
"""ONNX's own operators, and functions made of them that a graph brings along."""


def domains(bundle: Bundle) -> dict[str, set[str]]:
    """Of each graph, the domains it imports and those of its nodes, in loops, branches and functions too."""
    return {
        name: _domains(onnx.load(bundle.graph_path(name), load_external_data=False))
        for name in bundle.manifest.graphs
    }


def _domains(model: onnx.ModelProto) -> set[str]:
    nodes = [*_nodes(model.graph.node), *(node for body in model.functions for node in _nodes(body.node))]
    called = {(node.domain, node.op_type) for node in nodes if node.domain == "resprune"}
    assert called == {(function.domain, function.name) for function in model.functions}
    imported = {entry.domain for owner in (model, *model.functions) for entry in owner.opset_import}
    return imported | {node.domain for node in nodes}


def _nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _nodes(graph.node)
