"""int8 and int4: the matrix products by a weight, and they alone, of a graph that was traced in float32.

`int8` is dynamic: standard ONNX quantizes the rows as they come (one scale a tensor) and multiplies whole numbers;
the weights have a scale a column. `q4` packs the weights only, in blocks of 32 with a scale each, for ONNX Runtime's
MatMulNBits. Weights are quantized one at a time as they are written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper
from onnxruntime.capi._pybind_state import quantize_matmul_4bits  # pyright: ignore[reportAttributeAccessIssue] - a binary module
from torch import Tensor

from resprune.exporter.trace.tracer import Traced, Weight, unwritten

BLOCK = 32
ACCURACY_LEVEL = 4
"""MatMulNBits may round its input to int8, a block at a time: what makes it faster than float32."""
CHUNK_BYTES = 64 << 20


def quantize(traced: Traced, form: str) -> Traced:
    """The same graph with the products by its weights in `form`, "int8" or "q4"."""
    model = onnx.ModelProto()
    model.CopyFrom(traced.model)
    graph = model.graph
    nodes: list[NodeProto] = []
    weights = dict(traced.weights)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    added: dict[str, TensorProto] = {}
    rows: set[str] = set()  # values that are quantized already, for the products that share them
    for node in graph.node:
        weight = traced.weights.get(node.input[1]) if node.op_type in ("MatMul", "Gemm") else None
        if weight is None or not _stored_as_in_torch(node, weight):
            nodes.append(node)
            continue
        K, N = shapes[node.input[1]] if weight.transposed else shapes[node.input[1]][::-1]
        parts = _parts(form, weight, K, N)
        weights |= {name: part for name, (part, _) in parts.items()}
        added |= {name: unwritten(part, shape) for name, (part, shape) in parts.items()}
        biased = node.op_type == "Gemm" and len(node.input) == 3
        product = f"{node.output[0]}.product" if biased else node.output[0]
        if form == "q4":
            nodes.append(_int4_product(node.input[0], list(parts), product, K, N))
        else:
            nodes.extend(_int8_product(node.input[0], list(parts), product, rows))
        if biased:
            nodes.append(helper.make_node("Add", [product, node.input[2]], [node.output[0]]))
    used = {name for node in nodes for name in node.input} | set(added)
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend([*kept, *added.values()])
    if form == "q4":
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return Traced(model, {name: weight for name, weight in weights.items() if name in used})


def quantized_bytes(form: str, K: int, N: int) -> int:
    """Bytes of a weight [N, K] in `form`, "int8" or "q4", with its scales."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in _layout(form, K, N).values())


def quantized_chunks(part: str, matrices: Sequence[Tensor]) -> Iterator[Tensor]:
    """One part of a quantized weight [N, K], whose rows `matrices` have, flat, a few megabytes at a time."""
    slices = [rows for matrix in matrices for rows in torch.split(matrix, _fitting(matrix.shape[1]))]
    if part == "int8":
        scales = torch.cat([int8_scales(rows.float()) for rows in slices])[:, None]
        step = _fitting(len(scales))
        for columns in zip(*(torch.split(matrix, step, dim=1) for matrix in matrices), strict=True):
            numbers = torch.cat(columns).float().div_(scales).round_().to(torch.int8)  # [N, K']
            yield numbers.t().reshape(-1)
    elif part == "int8_scales":
        yield from (int8_scales(rows.float()) for rows in slices)
    else:
        for rows in slices:
            yield int4_blocks(rows.float())[("q4", "q4_scales").index(part)].reshape(-1)


def _fitting(width: int) -> int:
    """Rows of so many float32 numbers that make a chunk."""
    return max(1, CHUNK_BYTES // (4 * width))


def int8_scales(weight: Tensor) -> Tensor:
    """What ±127 of each row of [N, K] stands for, [N]; a row of zeros has 1."""
    largest = weight.abs().amax(dim=1)
    return torch.where(largest > 0, largest / 127, 1.0)


def int4_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of [N, K] in blocks of 32, as ONNX Runtime quantizes them: [N, blocks, 16] uint8 and scales [N, blocks]."""
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % BLOCK))
    N, K = padded.shape
    packed = np.zeros((N, K // BLOCK, BLOCK // 2), np.uint8)
    scales = np.zeros((N, K // BLOCK), np.float32)
    zero_points = np.zeros((N, -(-K // BLOCK // 2)), np.uint8)  # unused: the blocks are symmetric
    columns = padded.t().contiguous().numpy()  # [K, N]
    quantize_matmul_4bits(packed, columns, scales, zero_points, BLOCK, N, K, True)
    return torch.from_numpy(packed), torch.from_numpy(scales)


def _stored_as_in_torch(node: NodeProto, weight: Weight) -> bool:
    """Whether the product is by the transpose of a matrix [N, K] in the checkpoint."""
    if node.op_type == "MatMul":
        return weight.transposed
    attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
    plain = attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0 and not attributes.get(
        "transA"
    )
    return plain and bool(attributes.get("transB")) != weight.transposed


def _parts(form: str, weight: Weight, K: int, N: int) -> dict[str, tuple[Weight, tuple[int, ...]]]:
    """Initializers that a weight becomes: by name, which part of it and of which shape; the numbers first."""
    parts = (
        (replace(weight, dtype=dtype, transposed=False, part=part), shape)
        for part, (dtype, shape) in _layout(form, K, N).items()
    )
    return {part.name: (part, shape) for part, shape in parts}


def _layout(form: str, K: int, N: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The parts of a weight [N, K], their dtypes and shapes; the numbers first."""
    blocks = -(-K // BLOCK)
    numbers = (torch.int8, (K, N)) if form == "int8" else (torch.uint8, (N, blocks, BLOCK // 2))
    scales = (torch.float32, (N,) if form == "int8" else (N, blocks))
    return {form: numbers, f"{form}_scales": scales}


def _int4_product(rows: str, parts: list[str], output: str, K: int, N: int) -> NodeProto:
    return helper.make_node(
        "MatMulNBits",
        [rows, *parts],
        [output],
        domain="com.microsoft",
        K=K,
        N=N,
        bits=4,
        block_size=BLOCK,
        accuracy_level=ACCURACY_LEVEL,
    )


def _int8_product(rows: str, parts: list[str], output: str, quantized: set[str]) -> Iterator[NodeProto]:
    """The product by a weight of `rows` quantized on the spot, once for all the products that share them."""
    numbers, scale, zero_point = (f"{rows}.{name}" for name in ("int8", "int8_scale", "int8_zero_point"))
    if rows not in quantized:
        quantized.add(rows)
        yield helper.make_node("DynamicQuantizeLinear", [rows], [numbers, scale, zero_point])
    yield helper.make_node("MatMulInteger", [numbers, parts[0], zero_point], [f"{output}.int32"])
    yield helper.make_node("Cast", [f"{output}.int32"], [f"{output}.sum"], to=TensorProto.FLOAT)
    yield helper.make_node("Mul", [scale, parts[1]], [f"{output}.scales"])
    yield helper.make_node("Mul", [f"{output}.sum", f"{output}.scales"], [output])
