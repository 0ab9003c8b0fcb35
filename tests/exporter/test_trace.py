"""The traced graphs: portable operators, declared names and axes, float32 where it matters."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import torch

from resprune.exporter.checkpoint.checkpoint import resolve
from resprune.exporter.checkpoint.weightless import fake_mode
from resprune.exporter.families import split_model
from resprune.exporter.trace.tracer import OPSET, trace


def test_the_decoder_graph_is_portable(tiny_checkpoint: Callable[[str], Path]):
    """Standard operators only, names and axes of the bundle's table, nothing of this machine."""
    checkpoint, mode = resolve(str(tiny_checkpoint("clip-llama"))), fake_mode()
    components = split_model(checkpoint, torch.float16, mode)
    model = trace(components.decoder, components.model, mode).model
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", OPSET)}
    assert {node.domain for node in model.graph.node} == {""}
    operators = Counter(node.op_type for node in model.graph.node)
    assert not operators.keys() & {"Loop", "If", "NonZero", "Reciprocal"}
    layers = len(components.decoder.layers)
    assert operators["Sqrt"] == 2 * layers + 1, "RMS norms"
    assert operators["Div"] == operators["Sqrt"] + layers, "and the scaled rows of each MLP"
    names = [value.name for value in model.graph.input]
    assert names[:5] == [
        "inputs_embeds",
        "attention_mask",
        "position_ids",
        "past_key_values.0.key",
        "past_key_values.0.value",
    ]
    past = model.graph.input[3].type.tensor_type
    assert past.elem_type == onnx.TensorProto.FLOAT16
    assert [axis.dim_param or axis.dim_value for axis in past.shape.dim] == [
        "batch_size",
        2,
        "past_sequence_length",
        12,
    ]
    text = model.SerializeToString()
    assert b"/work" not in text
    assert b"site-packages" not in text


def test_half_precision_is_for_products_alone(tiny_checkpoint: Callable[[str], Path]):
    """Every operator that takes float16 moves or multiplies it; softmax, norms and angles are float32."""
    checkpoint, mode = resolve(str(tiny_checkpoint("clip-llama"))), fake_mode()
    components = split_model(checkpoint, torch.float16, mode)
    model = onnx.shape_inference.infer_shapes(trace(components.vision, components.model, mode).model)
    half = {value.name for value in model.graph.value_info if value.type.tensor_type.elem_type == 10}
    half |= {tensor.name for tensor in model.graph.initializer if tensor.data_type == 10}
    takers = {node.op_type for node in model.graph.node if half & set(node.input)}
    assert {"MatMul", "Conv", "Cast"} <= takers
    assert not takers & {"Softmax", "LayerNormalization", "Gelu", "Sigmoid", "Cos", "Sin", "ReduceMean"}
    assert takers <= {"MatMul", "Conv", "Cast", "Gather", "Reshape", "Transpose"}
