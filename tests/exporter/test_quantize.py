"""int8 and int4 graphs compute what their numbers say, and the numbers are the checkpoint's, rounded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import ModelProto, TensorProto, helper

from resprune.exporter.trace.quantize import int4_blocks, int8_scales, quantize, quantized_chunks
from resprune.exporter.trace.tracer import Traced, Weight
from resprune.exporter.trace.weights import write_graph, write_weights
from resprune.runtime.bundle.files import Bundle, read_bundle
from resprune.runtime.pipeline import Pipeline
from tests.exporter.portable import PORTABLE, domains
from tests.exporter.test_parity_llava import QUESTION, STEPS, picture

K, N = 40, 7  # K: a block of 32 and a part of one


@pytest.fixture
def weights() -> torch.Tensor:
    weights = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    weights[3] = 0
    return weights


def traced() -> Traced:
    """Two products of the same rows by one weight, one of them with a bias, and a product of two activations."""
    nodes = [
        helper.make_node("MatMul", ["x", "w.T"], ["y"]),
        helper.make_node("Gemm", ["x", "w", "bias"], ["z"], transB=1),
        helper.make_node("MatMul", ["x", "other"], ["u"]),
    ]

    def external(name: str, *dims: int) -> TensorProto:
        tensor = TensorProto(name=name, data_type=1, dims=dims, data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="unwritten")
        tensor.external_data.add(key="length", value=str(4 * int(np.prod(dims))))
        return tensor

    inputs = [("x", 2, K), ("other", K, 3)]
    outputs = [("y", 2, N), ("z", 2, N), ("u", 2, 3)]
    graph = helper.make_graph(
        nodes,
        "products",
        *(
            [helper.make_tensor_value_info(name, 1, shape) for name, *shape in values]
            for values in (inputs, outputs)
        ),
        [external("w.T", K, N), external("w", N, K), external("bias", N)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return Traced(
        model,
        {
            "w.T": Weight(("w",), torch.float32, transposed=True),
            "w": Weight(("w",), torch.float32, transposed=False),
            "bias": Weight(("bias",), torch.float32, transposed=False),
        },
    )


def written(folder: Path, form: str, weights: torch.Tensor, bias: torch.Tensor) -> Path:
    class InMemory:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

        def read(self) -> torch.Tensor:
            return self.tensor

    stored: Any = {"w": InMemory(weights), "bias": InMemory(bias)}
    path = folder / "products.onnx"
    quantized = quantize(traced(), form)
    write_graph(quantized, path)
    write_weights(quantized, path, stored)
    return path


def test_int4_numbers_are_the_weights_rounded(weights: torch.Tensor) -> None:
    values = int4_values(weights)
    _, scales = int4_blocks(weights)
    step = scales.abs().repeat_interleave(32, dim=1)[:, :K]
    # Half a step, but for the one end of the range that has no number: +8 steps become +7.
    assert ((values - weights).abs() <= step * 1.0001).all()
    assert ((values - weights).abs() <= step * 0.5001).float().mean() > 0.9
    assert not values[3].any()


def test_int8_numbers_are_the_weights_rounded(weights: torch.Tensor) -> None:
    scales = torch.cat(list(quantized_chunks("int8_scales", [weights])))
    numbers = torch.cat(list(quantized_chunks("int8", [weights]))).reshape(K, N)
    assert torch.equal(scales, int8_scales(weights))
    torch.testing.assert_close(numbers.T * scales[:, None], weights, atol=float(scales.max()) * 0.501, rtol=0)
    assert int(numbers.abs().max()) == 127


def test_int4_products(weights: torch.Tensor, tmp_path: Path) -> None:
    bias, x, other = torch.randn(N), torch.randn(2, K), torch.randn(K, 3)
    path = written(tmp_path, "q4", weights, bias)
    model = onnx.load(path)
    assert [node.op_type for node in model.graph.node] == ["MatMulNBits", "MatMulNBits", "Add", "MatMul"]
    y, z, u = run(without_rounded_rows(model), x, other)
    want = x @ int4_values(weights).T
    torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(z, want + bias, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(u, x @ other)


def test_int8_products(weights: torch.Tensor, tmp_path: Path) -> None:
    bias, x, other = torch.randn(N), torch.randn(2, K), torch.randn(K, 3)
    path = written(tmp_path, "int8", weights, bias)
    model = onnx.load(path)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("DynamicQuantizeLinear") == 1  # the rows are quantized once for both
    assert {entry.domain for entry in model.opset_import} == {""}
    y, z, u = run(model, x, other)
    scales = int8_scales(weights)[:, None]
    want = int8_rows(x) @ ((weights / scales).round() * scales).T
    torch.testing.assert_close(y, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(z, want + bias, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(u, x @ other)


def test_a_bundle_in_int4(tiny_bundle: Callable[..., Path]) -> None:
    """The decoder only; vision, embeddings and picks stay as they were."""
    plain = read_bundle(tiny_bundle("clip-llama", k=7))
    with Pipeline.load(plain.root) as vlm:
        picks = vlm.ask(picture(1), QUESTION, max_new_tokens=1, stream=False).images[0].pick_order
    bundle = read_bundle(tiny_bundle("clip-llama", k=7, dtype="q4"))
    assert {name: (graph.precision, graph.file) for name, graph in bundle.manifest.graphs.items()} == {
        "embed_tokens": ("fp32", "onnx/embed_tokens.onnx"),
        "vision_select": ("fp32", "onnx/vision_select.onnx"),
        "decoder_model_merged": ("q4", "onnx/decoder_model_merged_q4.onnx"),
    }
    assert domains(bundle)["decoder_model_merged"] - PORTABLE == {"com.microsoft"}
    assert set().union(*domains(plain).values()) == PORTABLE
    size = {
        b.root: b.manifest.files[f"{b.manifest.graphs['decoder_model_merged'].file}_data"].size
        for b in (plain, bundle)
    }
    assert size[bundle.root] < size[plain.root] / 4
    assert bundle.manifest.parity["picks"] == plain.manifest.parity["picks"]
    with Pipeline.load(bundle.root) as vlm:
        answer = vlm.ask(picture(1), QUESTION, max_new_tokens=STEPS, stream=False)
    assert answer.images[0].pick_order.tolist() == picks.tolist()
    assert len(answer.token_ids) == STEPS


def test_a_bundle_in_int8(tiny_bundle: Callable[..., Path]) -> None:
    bundle = read_bundle(tiny_bundle("clip-llama", k=7, dtype="int8"))
    files = {graph.file: graph.precision for graph in bundle.manifest.graphs.values()}
    assert files == {
        "onnx/embed_tokens.onnx": "fp32",
        "onnx/vision_select_quantized.onnx": "int8",
        "onnx/decoder_model_merged_quantized.onnx": "int8",
    }
    vision = onnx.load(bundle.graph_path("vision_select"), load_external_data=False)
    assert "MatMulInteger" in {node.op_type for node in vision.graph.node}
    for function in vision.functions:  # the selection stays float32
        assert "MatMulInteger" not in {node.op_type for node in function.node}
    assert {entry.domain for entry in vision.opset_import} == {"", "resprune"}
    with Pipeline.load(bundle.root) as vlm:
        answer = vlm.ask(picture(1), QUESTION, max_new_tokens=STEPS, stream=False)
    assert len(answer.token_ids) == STEPS


def data_size(bundle: Bundle) -> int:
    """Bytes of the decoder's weights."""
    file = bundle.manifest.graphs["decoder_model_merged"].file
    return bundle.manifest.files[f"{file}_data"].size


def run(model: ModelProto, x: torch.Tensor, other: torch.Tensor) -> list[torch.Tensor]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs = session.run(["y", "z", "u"], {"x": x.numpy(), "other": other.numpy()})
    return [torch.from_numpy(array) for array in outputs]


def without_rounded_rows(model: ModelProto) -> ModelProto:
    """MatMulNBits in float32, where it rounds its input to int8 otherwise."""
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    return model


def int4_values(weights: torch.Tensor) -> torch.Tensor:
    """The numbers [N, K] that the packed blocks stand for: two to a byte, the lower half first, 8 being zero."""
    packed, scales = int4_blocks(weights)
    numbers = torch.stack([(packed & 15).int() - 8, (packed >> 4).int() - 8], dim=-1).flatten(2)
    return (numbers * scales[..., None]).flatten(1)[:, : weights.shape[1]]


def int8_rows(x: torch.Tensor) -> torch.Tensor:
    """The numbers that DynamicQuantizeLinear's uint8 stand for: one scale and zero point for the whole tensor."""
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    scale = (high - low) / 255
    zero = round(-low / scale)
    return ((x / scale).round() + zero).clamp(0, 255).sub(zero) * scale
