"""Packed weights: the products by a weight, and they alone, and the lookup of embeddings, of a traced graph.

`int8` is standard ONNX: a scale for each row of the input, found as it comes, and one for each output; whole numbers
are multiplied. One scale for the whole input, which DynamicQuantizeLinear has, does not survive the outliers of
trained models. The words with bits pack the weights in blocks (blocks.py) for ONNX Runtime's MatMulNBits, which
rounds its input to 8 bits a block at a time. Weights are packed one at a time as they are written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx
import torch
from onnx import NodeProto, TensorProto, helper
from onnx_ir import tensor_adapters
from torch import Tensor

from resprune.exporter.checkpoint.shards import StoredTensor
from resprune.exporter.trace.blocks import HALF_MAX, SAMPLE_ROWS, Blocks, fit_of
from resprune.exporter.trace.tracer import IN_BLOCKS, INT8, SCALES, ZEROS, Traced, Weight, unwritten
from resprune.runtime.bundle.precisions import BLOCK, Precision

ACCURACY_LEVEL = 4
"""MatMulNBits may round its input to int8, a block at a time: without it 8 bits take 30 times float32's time."""
CHUNK_BYTES = 64 << 20

_Parts = dict[str, tuple[Weight, tuple[int, ...]]]
"""Initializers that a weight becomes: by name, which part of it and of which shape; the numbers first."""


@dataclass
class _Graph:
    """The graph as it is rewritten."""

    nodes: list[NodeProto]
    weights: dict[str, Weight]
    added: dict[str, TensorProto]
    made: set[str]
    """Values that are there already, for the products that share them."""
    half: bool

    def take(self, parts: _Parts) -> None:
        self.weights |= {name: part for name, (part, _) in parts.items()}
        self.added |= {name: unwritten(part, shape) for name, (part, shape) in parts.items()}

    def once(self, output: str, *nodes: NodeProto) -> str:
        """Nodes that end in `output`, unless it is there."""
        if output not in self.made:
            self.made.add(output)
            self.nodes.extend(nodes)
        return output

    def constant(self, name: str, tensor: TensorProto) -> str:
        self.added[name] = tensor
        return name


def quantize(
    traced: Traced, row: Precision, size: int = BLOCK, stored: Mapping[str, StoredTensor] | None = None
) -> Traced:
    """The same graph with its weights as the precision `row` has them, in blocks of `size`.

    `stored` is looked at to choose how 4-bit levels are laid (`fit_of`); without it that is "integer".
    """
    model = onnx.ModelProto()
    model.CopyFrom(traced.model)
    graph = model.graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    heads = _ends(graph)
    work = _Graph([], dict(traced.weights), {}, set(), row.element == "float16")
    products = [node for node in graph.node if _product_of(node, traced.weights)]
    fit = "integer"
    # Offsets are for the decoder, whose rows are [B, S, K]; a tower's may be [P, K], and none is published in 4 bits.
    spoken = any(value.name == "inputs_embeds" for value in graph.input)
    if row.bits == 4 and stored is not None:
        layers = {
            node.input[1]: traced.weights[node.input[1]] for node in products if node.output[0] not in heads
        }
        fit = fit_of([*_samples(layers.values(), stored)], size, offsets=spoken)
    for node in graph.node:
        if node.op_type == "Gather" and node.input[0] in traced.weights:
            _lookup(work, node, traced.weights[node.input[0]], shapes[node.input[0]], row, size)
            continue
        weight = _product_of(node, traced.weights)
        if weight is None or not row.quantized:
            work.nodes.append(node)
            continue
        K, N = shapes[node.input[1]] if weight.transposed else shapes[node.input[1]][::-1]
        biased = node.op_type == "Gemm" and len(node.input) == 3
        product = f"{node.output[0]}.product" if biased else node.output[0]
        if row.bits:
            bits = row.head_bits if node.output[0] in heads else row.bits
            assert bits is not None
            _block_product(work, node.input[0], weight, product, Blocks(bits, size, fit), (K, N))
        else:
            _int8_product(work, node.input[0], weight, product, (K, N))
        if biased:
            work.nodes.append(helper.make_node("Add", [product, node.input[2]], [node.output[0]]))
    used = {name for node in work.nodes for name in node.input} | set(work.added)
    # A table in half has the name that it had, in another type.
    kept = [tensor for tensor in graph.initializer if tensor.name in used - work.added.keys()]
    types = [value for value in graph.value_info if value.name not in traced.weights]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(work.nodes)
    graph.initializer.extend([*kept, *work.added.values()])
    graph.value_info.extend(types)
    if any(node.domain == "com.microsoft" for node in work.nodes) and not any(
        entry.domain == "com.microsoft" for entry in model.opset_import
    ):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return Traced(model, {name: weight for name, weight in work.weights.items() if name in used})


def packed_bytes(row: Precision, K: int, N: int, size: int) -> int:
    """Bytes of a weight [N, K] in `row`, at most: as if it had offsets."""
    if row.bits is None:
        layout = {"": (torch.int8, (N, K)), SCALES: (torch.float32, (N,))}
    else:
        layout = _layout(Blocks(row.bits, size, "offset"), K, N)
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout.values())


def packed_chunks(weight: Weight, matrices: Sequence[Tensor]) -> Iterator[Tensor]:
    """One part of a packed weight [N, K], whose rows `matrices` have, flat, a few megabytes at a time."""
    slices = [rows for matrix in matrices for rows in torch.split(matrix, _fitting(matrix.shape[1]))]
    if weight.blocks is not None:
        place = 1 if weight.part.endswith(SCALES) else 2 if weight.part.endswith(ZEROS) else 0
        yield from (weight.blocks.pack(rows)[place].reshape(-1) for rows in slices)
    elif weight.part == INT8:
        scales = torch.cat([int8_scales(rows.float()) for rows in slices])[:, None]
        step = _fitting(len(scales))
        for columns in zip(*(torch.split(matrix, step, dim=1) for matrix in matrices), strict=True):
            numbers = torch.cat(columns).float().div_(scales).round_().to(torch.int8)  # [N, K']
            yield numbers.t().reshape(-1)
    else:
        yield from (int8_scales(rows.float()) for rows in slices)


def int8_scales(weight: Tensor) -> Tensor:
    """What ±127 of each row of [N, K] stands for, [N]; a row of zeros has 1."""
    largest = weight.abs().amax(dim=1)
    return torch.where(largest > 0, largest / 127, 1.0)


def _fitting(width: int) -> int:
    """Rows of so many float32 numbers that make a chunk."""
    return max(1, CHUNK_BYTES // (4 * width))


def _samples(weights: Iterable[Weight], stored: Mapping[str, StoredTensor]) -> Iterator[Tensor]:
    """Some rows of each matrix, in float32."""
    for weight in weights:
        for name in weight.parameters:
            yield stored[name].read()[:SAMPLE_ROWS].float()


def _product_of(node: NodeProto, weights: Mapping[str, Weight]) -> Weight | None:
    """The weight of a product by the transpose of a matrix [N, K] in the checkpoint."""
    weight = weights.get(node.input[1]) if node.op_type in ("MatMul", "Gemm") else None
    if weight is None or node.op_type == "MatMul":
        return weight if weight is not None and weight.transposed else None
    attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
    plain = attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0 and not attributes.get(
        "transA"
    )
    return weight if plain and bool(attributes.get("transB")) != weight.transposed else None


def _ends(graph: onnx.GraphProto) -> set[str]:
    """The values that outputs of the graph are made of by sums and casts alone."""
    makers = {name: node for node in graph.node for name in node.output}
    ends = {value.name for value in graph.output}
    waiting = [*ends]
    while waiting:
        node = makers.get(waiting.pop())
        if node is not None and node.op_type in ("Add", "Cast", "Identity"):
            fresh = set(node.input) - ends
            ends |= fresh
            waiting += fresh
    return ends


def _layout(blocks: Blocks, K: int, N: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The parts of a weight [N, K], their dtypes and shapes; the numbers first."""
    count = blocks.count(K)
    layout = {
        "": (torch.uint8, (N, count, blocks.size * blocks.bits // 8)),
        SCALES: (torch.float16, (N, count)),
    }
    return layout | ({ZEROS: (torch.uint8, (N, -(-count // 2)))} if blocks.bits == 4 else {})


def _block_parts(weight: Weight, blocks: Blocks, K: int, N: int) -> _Parts:
    weight = replace(weight, transposed=False, blocks=blocks, largest=min(weight.largest, blocks.largest))
    parts = (
        (replace(weight, dtype=dtype, part=IN_BLOCKS.format(blocks.bits) + ending), shape)
        for ending, (dtype, shape) in _layout(blocks, K, N).items()
    )
    return {part.name: (part, shape) for part, shape in parts}


def _block_product(
    work: _Graph, rows: str, weight: Weight, output: str, blocks: Blocks, shape: tuple[int, int]
) -> None:
    K, N = shape
    parts = _block_parts(weight, blocks, K, N)
    work.take(parts)
    numbers, scales, *zeros = parts
    if blocks.offset(K):
        rows = _with_sums(work, rows, K, blocks.size)
    if not work.half:  # folded when the graph is loaded; in the file they take half the bytes
        wide = f"{scales}.float"
        scales = work.once(wide, helper.make_node("Cast", [scales], [wide], to=TensorProto.FLOAT))
    work.nodes.append(
        helper.make_node(
            "MatMulNBits",
            [rows, numbers, scales, *zeros],
            [output],
            domain="com.microsoft",
            K=blocks.columns(K),
            N=N,
            bits=blocks.bits,
            block_size=blocks.size,
            accuracy_level=ACCURACY_LEVEL,
        )
    )


def _with_sums(work: _Graph, rows: str, K: int, size: int) -> str:
    """Rows [B, S, K] followed by the sums of their blocks, which the offset columns are multiplied by."""
    blocks, sums, longer = (f"{rows}.{name}{size}" for name in ("blocks", "sums", "with_sums"))
    shape = f"blocks_of_{K // size}_{size}"
    work.constant(shape, helper.make_tensor(shape, TensorProto.INT64, [4], [0, 0, K // size, size]))
    work.constant("last_axis", helper.make_tensor("last_axis", TensorProto.INT64, [1], [-1]))
    return work.once(
        longer,
        helper.make_node("Reshape", [rows, shape], [blocks]),
        helper.make_node("ReduceSum", [blocks, "last_axis"], [sums], keepdims=0),
        helper.make_node("Concat", [rows, sums], [longer], axis=-1),
    )


def _int8_product(work: _Graph, rows: str, weight: Weight, output: str, shape: tuple[int, int]) -> None:
    """The product by a weight of `rows`, each rounded by its own scale, once for all the products that share them."""
    K, N = shape
    wanted = {INT8: (torch.int8, (K, N)), INT8 + SCALES: (torch.float32, (N,))}
    parts = {
        part.name: (part, dims)
        for part, dims in (
            (replace(weight, dtype=dtype, transposed=False, part=name), dims)
            for name, (dtype, dims) in wanted.items()
        )
    }
    work.take(parts)
    matrix, column_scales = parts
    for name, value in (("int8_step", 1 / 127), ("int8_least", 1e-30), ("int8_middle", 128.5)):
        work.constant(name, helper.make_tensor(name, TensorProto.FLOAT, [], [value]))
    work.constant("int8_zero", helper.make_tensor("int8_zero", TensorProto.UINT8, [], [128]))
    size, largest, scaled, scale, ratio, number, numbers = (
        f"{rows}.int8_{name}" for name in ("size", "largest", "scaled", "scale", "ratio", "number", "rows")
    )
    work.constant("last_axis", helper.make_tensor("last_axis", TensorProto.INT64, [1], [-1]))
    work.once(
        numbers,
        helper.make_node("Abs", [rows], [size]),
        helper.make_node("ReduceMax", [size, "last_axis"], [largest], keepdims=1),
        helper.make_node("Mul", [largest, "int8_step"], [scaled]),
        helper.make_node("Max", [scaled, "int8_least"], [scale]),
        helper.make_node("Div", [rows, scale], [ratio]),
        # Cast cuts off what is behind the point: with a half added it rounds.
        helper.make_node("Add", [ratio, "int8_middle"], [number]),
        helper.make_node("Cast", [number], [numbers], to=TensorProto.UINT8),
    )
    work.nodes += [
        helper.make_node("MatMulInteger", [numbers, matrix, "int8_zero"], [f"{output}.int32"]),
        helper.make_node("Cast", [f"{output}.int32"], [f"{output}.sum"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{output}.sum", column_scales], [f"{output}.columns"]),
        helper.make_node("Mul", [f"{output}.columns", scale], [output]),
    ]


def _lookup(
    work: _Graph, node: NodeProto, weight: Weight, shape: tuple[int, ...], row: Precision, size: int
) -> None:
    """Embeddings packed in blocks, or in half; as they were where a row has no whole number of blocks."""
    V, D = shape
    (output,) = node.output
    # What is found is half, and the graph goes on in the type that its own table was traced with.
    found = output if weight.dtype == torch.float16 else f"{output}.half"
    traced_type = tensor_adapters.from_torch_dtype(weight.dtype)
    casts = [] if found == output else [helper.make_node("Cast", [found], [output], to=traced_type)]
    # The largest block that a row has a whole number of: no kernel takes one that is cut off.
    size = next((fitting for fitting in (size, 64, 32, 16) if fitting <= size and D % fitting == 0), 0)
    if row.bits and size:
        blocks = Blocks(row.bits, size, "integer")
        parts = _block_parts(replace(weight, largest=HALF_MAX), blocks, D, V)  # what is found is half
        numbers = next(iter(parts))
        parts[numbers] = (parts[numbers][0], (V, D * row.bits // 8))
        work.take(parts)
        table, scales, *zeros = parts
        attributes: dict[str, Any] = {
            "bits": row.bits,
            "block_size": size,
            "gather_axis": 0,
            "quantize_axis": 1,
        }
        work.nodes.append(
            helper.make_node(
                "GatherBlockQuantized",
                [table, node.input[1], scales, *zeros],
                [found],
                domain="com.microsoft",
                **attributes,
            )
        )
        work.nodes += casts
    elif row.element == "float16" and casts:
        half = replace(weight, dtype=torch.float16, largest=HALF_MAX)
        work.weights[half.name] = half
        work.added[half.name] = unwritten(half, shape)
        work.nodes += [helper.make_node("Gather", [half.name, node.input[1]], [found]), *casts]
    else:
        work.nodes.append(node)
