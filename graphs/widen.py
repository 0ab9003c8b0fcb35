"""A bfloat16 graph as a CPU can run it: the same numbers at every border, its products computed in float32.

ONNX Runtime's CPU provider moves and casts bfloat16 but has no product in it. A product of bfloat16 numbers, summed
in float32 and rounded to bfloat16, is what a processor that has one computes, but for the order of the sum.
"""

from __future__ import annotations

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

PRODUCTS = ("MatMul", "Gemm")


def widen(model: ModelProto) -> ModelProto:
    """A copy in which each bfloat16 MatMul or Gemm is cast to float32 and its result back.

    Inputs and outputs of the graph that are bfloat16, for which NumPy has no type, are float32 and cast inside.
    """
    widened = ModelProto()
    widened.CopyFrom(model)
    narrow = _narrow_values(model)
    graph = widened.graph
    renamed = {value.name: f"{value.name}.narrow" for value in graph.input if value.name in narrow}
    nodes = [_cast(name, inner, TensorProto.BFLOAT16) for name, inner in renamed.items()]
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
        wide = node.op_type in PRODUCTS and any(name in narrow for name in node.output)
        nodes.extend(_widened(node) if wide else [node])
    for value in graph.output:
        if value.name in narrow:
            inner = f"{value.name}.narrow"
            for node in nodes:
                for index, name in enumerate(node.output):
                    node.output[index] = inner if name == value.name else name
                for index, name in enumerate(node.input):
                    node.input[index] = inner if name == value.name else name
            nodes.append(_cast(inner, value.name, TensorProto.FLOAT))
    for value in (*graph.input, *graph.output):
        if value.name in narrow:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    return widened


def _narrow_values(model: ModelProto) -> set[str]:
    """Names of the graph's bfloat16 values."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in (*graph.input, *graph.output, *graph.value_info)
    }
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    return {name for name, element_type in types.items() if element_type == TensorProto.BFLOAT16}


def _widened(node: NodeProto) -> list[NodeProto]:
    wide = NodeProto()
    wide.CopyFrom(node)
    wide.output[0] = f"{node.output[0]}.wide"
    casts = []
    for index, name in enumerate(node.input):
        wide.input[index] = f"{node.output[0]}.wide_{index}"
        casts.append(_cast(name, wide.input[index], TensorProto.FLOAT))
    return [*casts, wide, _cast(wide.output[0], node.output[0], TensorProto.BFLOAT16)]


def _cast(source: str, target: str, element_type: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], to=element_type)
