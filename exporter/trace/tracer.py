"""A weightless component → an ONNX graph whose weights are references, to be filled in by weights.py.

torch.export runs the component on fake tensors and the torch → ONNX exporter translates the result. While the graph is
optimised its weights are graph inputs, so that nothing tries to read them; afterwards each becomes an initializer
in an external file, under the name that the parameter has in the Hugging Face model.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import onnx
import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from onnxscript.optimizer import optimize_ir
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from resprune.elements import BY_ONNX
from resprune.exporter.checkpoint.weightless import is_fake
from resprune.exporter.components import Component
from resprune.exporter.trace.blocks import Blocks
from resprune.exporter.trace.repeat import expand, firsts_alike, stand_in, traced_once
from resprune.exporter.trace.translate import translate
from resprune.runtime.bundle.manifest import TensorSpec

try:
    from resprune.exporter.trace.shortcuts import shortcuts
except (ImportError, AttributeError):  # of a torch, or an onnxscript, without them
    shortcuts = nullcontext  # type: ignore[assignment]

OPSET = 20
"""LayerNormalization (17), Gelu (20); ONNX Runtime since 1.17 and TensorRT since 10 take all of it."""

PACKED = "+"
"""Between the names of parameters that are one initializer; none has it in its own."""
TRANSPOSED = "T"
"""After the name of an initializer that is transposed."""
INT8, IN_BLOCKS = "int8", "q{}"
"""After the name of one that is quantized: whole, or in blocks of so many bits a number."""
SCALES, ZEROS = "_scales", "_zeros"
"""After that, for what its numbers are multiplied by, and which of them is zero."""

SIZES = {"batch_size": 2, "sequence_length": 3, "past_sequence_length": 5}
"""Example sizes while tracing: 2 or more and all different, or torch.export takes them for constants."""


@dataclass(frozen=True)
class Weight:
    """One initializer: which parameter of the Hugging Face model it is, and whether it is stored transposed.

    Several parameters are one below the other, as they are in the checkpoint (packed.py), and transposed as a whole.
    `part` names what of a quantized parameter it is (quantize.py), "" the parameter itself; `blocks` is how it is cut.
    `largest` is the largest magnitude that its numbers, or the products of them, can have in the graph.
    """

    parameters: tuple[str, ...]
    dtype: torch.dtype
    transposed: bool
    part: str = ""
    blocks: Blocks | None = None
    largest: float = math.inf

    @property
    def name(self) -> str:
        """The initializer's."""
        ending = TRANSPOSED if self.transposed else self.part
        return PACKED.join(self.parameters) + (f".{ending}" if ending else "")


@dataclass(frozen=True)
class Traced:
    """A graph without its weights; `weights` has, by initializer name, what belongs there."""

    model: onnx.ModelProto
    weights: dict[str, Weight]


class _Part(nn.Module):
    """What is traced of a component: all but the states of layers like an earlier one, whose states they share.

    `firsts` has for each layer the first that it is like; `inputs` and `outputs` are those that are left.
    """

    def __init__(self, component: Component, firsts: Sequence[int]) -> None:
        super().__init__()
        self.module = component.module
        self.inputs, self.outputs = (
            [spec for spec in specs if stand_in(spec.name, firsts) == spec.name]
            for specs in (component.inputs, component.outputs)
        )
        names = [spec.name for spec in self.inputs]
        self.sources = [names.index(stand_in(spec.name, firsts)) for spec in component.inputs]
        self.results = [component.outputs.index(spec) for spec in self.outputs]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = self.module(*(inputs[source] for source in self.sources))
        return tuple(outputs[result] for result in self.results)


def trace(component: Component, whole: nn.Module, mode: FakeTensorMode, *, repeat: bool = True) -> Traced:
    """Trace one component of the weightless model `whole`; with `repeat`, one of its layers of each kind."""
    layers = component.layers if repeat else ()
    example = component.samples(SIZES, torch.Generator())
    with mode:
        fakes = [mode.from_tensor(tensor) for tensor in example]
        firsts = firsts_alike(component, fakes) if repeat else range(len(component.layers))
    part = _Part(component, firsts)
    # Without gradients from the start: code that turns them off would else become a graph of its own in the program.
    with _quiet(), torch.no_grad(), traced_once(layers, firsts), shortcuts():
        program = torch.export.export(
            part.eval(),
            tuple(fakes[component.inputs.index(spec)] for spec in part.inputs),
            dynamic_shapes=(tuple(map(_dynamic_axes, part.inputs)),),
            strict=False,
        )
        model = translate(
            program,
            input_names=[spec.name for spec in part.inputs],
            output_names=[spec.name for spec in part.outputs],
            opset_version=OPSET,
        ).model
    names = {id(tensor): name for name, tensor in whole.named_parameters(remove_duplicate=False)}
    pending = _weights_to_inputs(model.graph, part, names)
    with shortcuts():
        optimize_ir(model)
    _divide_by_roots(model.graph)
    _drop_reshapes(model.graph)
    RemoveUnusedNodesPass()(model)
    weights = dict(_inputs_to_weights(model.graph, pending))
    expand(model.graph, layers, names, weights)
    _declare(model.graph, component)
    ClearMetadataAndDocStringPass()(model)  # stack traces of the tracer, with paths of this machine
    model.producer_name, model.producer_version = "resprune", None
    for function in component.functions:
        model.functions[function.identifier()] = function
    return Traced(ir.to_proto(model), weights)


def unwritten(weight: Weight, shape: Sequence[int]) -> onnx.TensorProto:
    """The initializer of a weight, whose data weights.py is to write."""
    tensor = onnx.TensorProto(
        name=weight.name,
        data_type=tensor_adapters.from_torch_dtype(weight.dtype),
        dims=shape,
        data_location=onnx.TensorProto.EXTERNAL,
    )
    for key, value in (("location", "unwritten"), ("length", math.prod(shape) * weight.dtype.itemsize)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def tensor_specs(values: Iterable[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    """Inputs or outputs of a written graph, as the manifest has them."""

    def spec(value: onnx.ValueInfoProto) -> TensorSpec:
        tensor = value.type.tensor_type
        shape = tuple(axis.dim_param or axis.dim_value for axis in tensor.shape.dim)
        return TensorSpec(value.name, BY_ONNX[tensor.elem_type].name, shape)

    return tuple(spec(value) for value in values)


def _dynamic_axes(spec: TensorSpec) -> dict[int, object]:
    """As torch.export wants them."""
    return {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(spec.shape) if isinstance(size, str)}


def _weights_to_inputs(graph: ir.Graph, module: nn.Module, names: Mapping[int, str]) -> dict[str, str]:
    """Turn weightless initializers into graph inputs; returns input name → what `names` calls the parameter."""
    pending = {}
    for name, value in list(graph.initializers.items()):
        if value.const_value is not None and is_fake(getattr(value.const_value, "raw", None)):
            pending[name] = names[id(module.get_parameter(name))]
            del graph.initializers[name]
            value.const_value = None
            graph.inputs.append(value)
    return pending


def _inputs_to_weights(graph: ir.Graph, pending: dict[str, str]) -> Iterator[tuple[str, Weight]]:
    """Turn the inputs back into initializers with their data elsewhere; transposes of a weight are done when writing.

    ONNX Runtime would do them at each start, and hold both copies.
    """
    for value in [value for value in graph.inputs if value.name in pending]:
        graph.inputs.remove(value)
        if not value.uses():
            continue
        assert value.name is not None
        assert value.shape is not None
        assert value.dtype is not None
        parameter = pending[value.name]
        users = [use.node for use in value.uses()]
        transposed = all(_is_matrix_transpose(node) for node in users)
        if transposed:
            value.shape = ir.Shape(list(reversed(value.shape.numpy())))
            for node in users:
                ir.convenience.replace_all_uses_with(node.outputs[0], value)
                graph.remove(node, safe=True)
        dtype = tensor_adapters.to_torch_dtype(value.dtype)
        weight = Weight((parameter,), dtype, transposed, largest=torch.finfo(dtype).max)
        value.name = weight.name
        shape = value.shape.numpy()
        value.const_value = ir.ExternalTensor(
            location="unwritten",
            offset=0,
            length=int(math.prod(shape) * value.dtype.itemsize),
            dtype=value.dtype,
            shape=value.shape,
            name=value.name,
        )
        graph.register_initializer(value)
        yield weight.name, weight


def _divide_by_roots(graph: ir.Graph) -> None:
    """Write x · (1 / √y) as x / √y: what runtimes know as the end of an RMS norm, and make one operator of."""
    for node in [node for node in graph if node.op_type == "Mul"]:
        for value, other in (node.inputs, reversed(node.inputs)):
            inverse = value.producer() if value is not None else None
            if value is not None and inverse is not None and inverse.op_type == "Reciprocal":
                quotient = ir.node("Div", [other, inverse.inputs[0]], name=node.name)
                result, former = quotient.outputs[0], node.outputs[0]
                result.name, result.type, result.shape = former.name, former.type, former.shape
                graph.insert_before(node, quotient)
                ir.convenience.replace_all_uses_with(former, result)
                graph.remove(node, safe=True)
                if not value.uses():
                    graph.remove(inverse, safe=True)
                break


def _drop_reshapes(graph: ir.Graph) -> None:
    """Leave out reshapes that end in the shape they began with; of the tracer's axes, those of one name are equal."""
    for node in [node for node in graph if node.op_type == "Reshape"]:
        result, source = node.outputs[0], _before_reshapes(node)
        known = result.shape is not None and None not in list(result.shape)
        if known and source.shape == result.shape and not result.is_graph_output():
            ir.convenience.replace_all_uses_with(result, source)


def _before_reshapes(node: ir.Node) -> ir.Value:
    """What a chain of reshapes that ends with `node` begins with."""
    source = node.inputs[0]
    assert source is not None
    before = source.producer()
    return _before_reshapes(before) if before is not None and before.op_type == "Reshape" else source


def _is_matrix_transpose(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [1, 0]


def _declare(graph: ir.Graph, component: Component) -> None:
    """Name the dynamic axes of inputs and outputs as the bundle does, and forget the tracer's names for the rest."""
    for node in graph:
        for value in node.outputs:
            value.shape = None
    for values, specs in ((graph.inputs, component.inputs), (graph.outputs, component.outputs)):
        named = {value.name: value for value in values}
        values[:] = [named[spec.name] for spec in specs]
        for value, spec in zip(values, specs, strict=True):
            _check_declared(value, spec)
            value.shape = ir.Shape(list(spec.shape))
            value.metadata_props.clear()


def _check_declared(value: ir.Value, spec: TensorSpec) -> None:
    wanted = ir.DataType[spec.dtype.upper().replace("FLOAT32", "FLOAT")].name
    if value.name != spec.name or value.dtype is None or value.dtype.name != wanted:
        raise AssertionError(f"traced {value.name} as {value.dtype}, declared {spec.name} as {spec.dtype}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the tracer says about itself; torch warns about its own deprecations and absent torchvision."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
