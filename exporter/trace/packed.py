"""Products of the same rows by several weights become one product, which a Split takes apart.

In a decoder those are query, key and value, and the two products that open its MLP. A step of one token does little
else than read weights, and at the end of each product its threads wait for each other: the fewer ends, the better.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain

import onnx
from onnx import NodeProto, TensorProto, helper

from resprune.exporter.trace.tracer import Traced, Weight, unwritten

Users = Mapping[str, Sequence[NodeProto]]
"""The nodes that take a value, by its name."""


def pack(traced: Traced) -> Traced:
    """The same graph with one product wherever several are of the same rows, by their weights side by side."""
    model = onnx.ModelProto()
    model.CopyFrom(traced.model)
    graph, weights = model.graph, dict(traced.weights)
    users: dict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            users[name].append(node)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    # What takes the place of nodes, by their first output, and of initializers, by their name.
    nodes: dict[str, list[NodeProto]] = {}
    tensors: dict[str, list[TensorProto]] = {}
    splits: dict[str, TensorProto] = {}
    for products in _of_the_same_rows(graph.node, weights, users):
        names = [product.input[1] for product in products]
        several = [weights.pop(name) for name in names]
        weight = replace(several[0], parameters=tuple(chain(*(one.parameters for one in several))))
        weights[weight.name] = weight
        sizes = [shapes[name][1] for name in names]
        first, *others = names
        tensors[first] = [unwritten(weight, (shapes[first][0], sum(sizes)))]
        tensors |= {name: [] for name in others}
        split = f"split_{'_'.join(map(str, sizes))}"  # one for all of these sizes: like layers stay alike
        splits[split] = helper.make_tensor(split, TensorProto.INT64, [len(sizes)], sizes)
        nodes |= _packed(products, users, weight.name, split)
    written = [new for node in graph.node for new in nodes.get(node.output[0], [node])]
    stored = [new for tensor in graph.initializer for new in tensors.get(tensor.name, [tensor])]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(written)
    graph.initializer.extend([*stored, *splits.values()])
    return Traced(model, weights)


def _of_the_same_rows(
    nodes: Sequence[NodeProto], weights: Mapping[str, Weight], users: Users
) -> list[list[NodeProto]]:
    """Products of one and the same value by transposed weights of their own, two or more at a time."""
    sharing: dict[str, list[NodeProto]] = defaultdict(list)
    for node in nodes:
        weight = weights.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is not None and weight.transposed and len(users[weight.name]) == 1:
            sharing[node.input[0]].append(node)
    return [products for products in sharing.values() if len(products) > 1]


def _packed(
    products: Sequence[NodeProto], users: Users, weight: str, split: str
) -> dict[str, list[NodeProto]]:
    """What takes the place of each node that goes, by its output: that of the first product is taken by all of it."""
    steps = [products]
    casts = [user for product in products for user in users[product.output[0]]]
    # Products in half are cast before they are split: ONNX Runtime, which computes them in float32 on a CPU,
    # would otherwise cast to half and back around the Split.
    targets = {_cast_to(cast) for cast in casts}
    if len(casts) == len(products) and len(targets) == 1 and None not in targets:
        steps.append(casts)
    nodes = []
    value = products[0].input[0]
    for like in steps:
        node = NodeProto()
        node.CopyFrom(like[0])
        node.input[0], value = value, f"{like[0].output[0]}.packed"
        node.output[0] = value
        nodes.append(node)
    nodes[0].input[1] = weight
    parts = [node.output[0] for node in steps[-1]]
    nodes.append(helper.make_node("Split", [value, split], parts, axis=-1))
    return {node.output[0]: [] for node in chain(*steps)} | {products[0].output[0]: nodes}


def _cast_to(node: NodeProto) -> int | None:
    """The type that a Cast casts to."""
    return int(helper.get_node_attr_value(node, "to")) if node.op_type == "Cast" else None
