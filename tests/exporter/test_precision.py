"""bf16: what is narrow in the graphs, what stays float32, and what a machine without it is told."""

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import ModelProto, TensorProto

from resprune.exporter.trace.precision import precision_of
from resprune.runtime.bundle.files import Bundle, read_bundle
from resprune.runtime.errors import ResPruneError
from resprune.runtime.pipeline import Pipeline


@pytest.fixture
def bundle(tiny_bundle: Callable[..., Path]) -> Bundle:
    return read_bundle(tiny_bundle("clip-llama", k=7, dtype="bf16"))


def narrow_values(model: ModelProto) -> set[str]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in (*graph.value_info, *graph.input, *graph.output)
    }
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    return {name for name, element_type in types.items() if element_type == TensorProto.BFLOAT16}


def test_products_are_narrow_and_the_rest_is_not(bundle: Bundle) -> None:
    """Every product by a weight, and those of attention; never a sum, a norm, a softmax or the selection."""
    for name in bundle.manifest.graphs:
        model = onnx.load(bundle.graph_path(name), load_external_data=False)
        narrow = narrow_values(model)
        kinds = {node.op_type for node in model.graph.node if narrow & {*node.input, *node.output}}
        assert kinds <= {"MatMul", "Cast", "Transpose", "Reshape", "Concat", "Gather", "Shape"}, name
        products = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm")]
        if name == "decoder_model_merged":  # 7 matrices a layer, 2 of attention, lm_head
            assert sum(node.output[0] in narrow for node in products) == 2 * 9 + 1


def test_the_cache_is_narrow_and_the_borders_are_not(bundle: Bundle) -> None:
    decoder = bundle.manifest.graphs["decoder_model_merged"]
    assert decoder.file == "onnx/decoder_model_merged_bf16.onnx"
    for tensor in (*decoder.inputs, *decoder.outputs):
        cached = tensor.name.startswith(("past_key_values.", "present."))
        assert (tensor.dtype == "bfloat16") == cached, tensor.name


def test_the_loss_is_recorded(bundle: Bundle) -> None:
    parity = bundle.manifest.parity
    logits = parity["outputs"]["decoder_model_merged_bf16"]["logits"]
    assert 1e-4 * logits["scale"] < logits["max_diff"] < 1e-1 * logits["scale"]
    assert parity["picks"].endswith("/21")
    assert parity["greedy_tokens"].endswith("/32")


def test_a_provider_without_bf16_is_one_sentence(bundle: Bundle) -> None:
    with pytest.raises(
        ResPruneError, match=r"is bf16, in which the provider cpu cannot compute; .*--dtype fp16"
    ) as raised:
        Pipeline.load(bundle.root)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("graph", "dtype", "precision"),
    [
        ("decoder_model_merged", "q4", "q4"),
        ("vision_select", "q4", "fp32"),
        ("vision_select", "int8", "int8"),
        ("embed_tokens", "int8", "fp32"),
        ("token_select", "int8", "fp32"),
        ("embed_tokens", "bf16", "bf16"),
    ],
)
def test_which_graphs_a_precision_changes(graph, dtype, precision):
    assert precision_of(graph, dtype) == precision
