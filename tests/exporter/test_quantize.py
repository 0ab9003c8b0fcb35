"""Packed graphs compute what their numbers say, and the numbers are the checkpoint's, rounded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import ModelProto, TensorProto, helper

from resprune.elements import ELEMENTS
from resprune.exporter.trace.blocks import FITS, Blocks, fit_of
from resprune.exporter.trace.quantize import int8_scales, packed_chunks, quantize
from resprune.exporter.trace.tracer import Traced, Weight, unwritten
from resprune.exporter.trace.weights import write_graph, write_weights
from resprune.exporter.verify.difference import difference
from resprune.names import DECODER
from resprune.runtime.bundle.files import read_bundle
from resprune.runtime.bundle.precisions import PRESETS, TABLE, parse_dtype
from resprune.runtime.pipeline import Pipeline
from tests.exporter.hugging_face import STEPS, picture
from tests.exporter.portable import PORTABLE, domains
from tests.runtime.pipelines import QUESTION

K, N = 40, 7  # K: a block of 32 and a part of one


@pytest.fixture
def weights() -> torch.Tensor:
    weights = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    weights[3] = 0
    return weights


def drawn(*shape: int) -> torch.Tensor:
    """The same numbers whatever ran before."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


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


class InMemory:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype

    def read(self) -> torch.Tensor:
        return self.tensor


def written(folder: Path, form: str, weights: torch.Tensor, bias: torch.Tensor) -> Path:
    stored: Any = {"w": InMemory(weights), "bias": InMemory(bias)}
    path = folder / "products.onnx"
    quantized = quantize(traced(), TABLE[form])
    write_graph(quantized, path)
    write_weights(quantized, path, stored)
    return path


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [32, 64])
def test_int4_numbers_are_the_weights_rounded(fit: str, size: int, weights: torch.Tensor) -> None:
    """Half a level, and a whole one at the ends; a row of zeros stays one."""
    blocks = Blocks(4, size, fit)
    _, scales, _ = blocks.pack(weights)
    level = scales.float().abs().repeat_interleave(size, dim=1)[:, :K]
    gap = (blocks.values(weights) - weights).abs()
    assert (gap <= level * 1.01).all()
    assert (gap <= level * 0.501).float().mean() > 0.9
    assert not blocks.values(weights)[3].any()


def test_weights_of_4_bits_are_packed_without_loss() -> None:
    """Of Q4_0, which has a scale, and of Q4_1, which has a minimum too; others take the fit that loses least."""
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 16, (50, 6, 32), generator=generator)
    levels[..., 0] = 0
    scale = torch.rand(50, 6, 1, generator=generator).add(0.5).half().float() / 100
    least = -scale * (7.5 + torch.randn(50, 6, 1, generator=generator)).clamp(4, 11)
    q4_0, q4_1 = ((levels - 8) * scale).flatten(1), (levels * scale + least).flatten(1)
    other = torch.randn(50, 192, generator=generator)
    for rows, fit, most in ((q4_0, "symmetric", 1e-3), (q4_1, "offset", 2e-2), (other, "integer", 0.1)):
        assert fit_of([rows], 32) == fit
        lost = Blocks(4, 32, fit).values(rows) - rows
        assert lost.norm() / rows.norm() < most
    assert fit_of([q4_1], 32, offsets=False) != "offset"


def test_8_bit_numbers_of_q8_0_are_its_own() -> None:
    numbers = torch.randint(-127, 128, (20, 64), generator=torch.Generator().manual_seed(0)).float()
    numbers[:, ::32] = 127
    assert torch.equal(Blocks(8, 32).values(numbers / 256), numbers / 256)


def test_int8_numbers_are_the_weights_rounded(weights: torch.Tensor) -> None:
    of_scales, of_numbers = (
        Weight(("w",), dtype, transposed=False, part=part)
        for dtype, part in ((torch.float32, "int8_scales"), (torch.int8, "int8"))
    )
    scales = torch.cat(list(packed_chunks(of_scales, [weights])))
    numbers = torch.cat(list(packed_chunks(of_numbers, [weights]))).reshape(K, N)
    assert torch.equal(scales, int8_scales(weights))
    torch.testing.assert_close(numbers.T * scales[:, None], weights, atol=float(scales.max()) * 0.501, rtol=0)
    assert int(numbers.abs().max()) == 127


@pytest.mark.parametrize("form", ["q4", "q8"])
def test_products_in_blocks(form: str, weights: torch.Tensor, tmp_path: Path) -> None:
    """The outputs themselves are heads here, so both have 8 bits."""
    bias, x, other = drawn(N), drawn(2, K), drawn(K, 3)
    model = onnx.load(written(tmp_path, form, weights, bias))
    kinds = [node.op_type for node in model.graph.node]
    assert [kind for kind in kinds if kind != "Cast"] == ["MatMulNBits", "MatMulNBits", "Add", "MatMul"]
    y, z, u = run(without_rounded_rows(model), x, other)
    want = x @ Blocks(8, 32).values(weights).T
    torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(z, want + bias, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(u, x @ other)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("from_4_bits", [False, True])
def test_decoder_products_in_4_bits(size: int, from_4_bits: bool, tmp_path: Path) -> None:
    """With offsets where the weights came from 4 bits, for which the sums of the blocks are added to the rows once."""
    width = 4 * size
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(N, width, generator=generator)
    if from_4_bits:
        levels = torch.randint(0, 16, (N, 4, size), generator=generator)
        weights = ((levels - 7.5 + torch.randn(N, 4, 1, generator=generator)) / 50).flatten(1)
    product = helper.make_node("MatMul", ["inputs_embeds", "w.T"], ["a"])
    nodes = [product, helper.make_node("Relu", ["a"], ["logits"])]
    shapes = {"inputs_embeds": [1, 3, width], "logits": [1, 3, N]}
    inputs, outputs = ([helper.make_tensor_value_info(n, 1, shapes[n])] for n in shapes)
    tensor = TensorProto(name="w.T", data_type=1, dims=(width, N), data_location=TensorProto.EXTERNAL)
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, [tensor])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    stored: Any = {"w": InMemory(weights)}
    packed = quantize(
        Traced(model, {"w.T": Weight(("w",), torch.float32, transposed=True)}), TABLE["q4"], size, stored
    )
    path = tmp_path / "decoder.onnx"
    write_graph(packed, path)
    write_weights(packed, path, stored)
    written_model = onnx.load(path)
    kinds = {node.op_type for node in written_model.graph.node}
    assert ("ReduceSum" in kinds) == from_4_bits
    x = torch.randn(1, 3, width, generator=generator)
    session = ort.InferenceSession(
        without_rounded_rows(written_model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (got,) = session.run(None, {"inputs_embeds": x.numpy()})
    values = Blocks(4, size, "offset" if from_4_bits else "integer").values(weights)
    torch.testing.assert_close(torch.from_numpy(got), (x @ values.T).relu(), atol=1e-4, rtol=1e-4)


def test_int8_products(weights: torch.Tensor, tmp_path: Path) -> None:
    """A scale for each row: an outlier in one does not touch the other."""
    bias, x, other = drawn(N), drawn(2, K), drawn(K, 3)
    x[0, 0] = 1000
    path = written(tmp_path, "int8", weights, bias)
    model = onnx.load(path)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("ReduceMax") == 1  # the rows are quantized once for both
    assert {entry.domain for entry in model.opset_import} == {""}
    y, z, u = run(model, x, other)
    scales = int8_scales(weights)[:, None]
    want = int8_rows(x) @ ((weights / scales).round() * scales).T
    torch.testing.assert_close(y, want, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(z, want + bias, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(u, x @ other)
    assert (y[1] - x[1] @ weights.T).abs().max() < 0.1


@pytest.mark.parametrize(
    ("element", "word"), [(element, row.word) for row in TABLE.values() for element in row.embeds_for]
)
def test_embeddings_in_each_precision_beside_each_type(element: str, word: str, tmp_path: Path) -> None:
    """What is found is the table's, whatever type the rest was traced in."""
    row, table = TABLE[word], drawn(11, 64)
    weight = Weight(("w",), getattr(torch, element), transposed=False)
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["w", "ids"], ["found"]),
            helper.make_node("Cast", ["found"], ["y"], to=TensorProto.FLOAT),
        ],
        "embeddings",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, (2, 3))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (2, 3, 64))],
        [unwritten(weight, table.shape)],
        value_info=[
            helper.make_tensor_value_info("w", ELEMENTS[element].onnx, table.shape),
            helper.make_tensor_value_info("found", ELEMENTS[element].onnx, (2, 3, 64)),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    quantized = quantize(Traced(model, {"w": weight}), row)
    stored: Any = {"w": InMemory(table)}
    path = tmp_path / "embeddings.onnx"
    write_graph(quantized, path)
    write_weights(quantized, path, stored)
    types = {tensor.data_type for tensor in quantized.model.graph.initializer}
    assert types == ({ELEMENTS[row.element].onnx} if not row.bits else {2, 10})
    ids = np.array([[0, 10, 3], [3, 5, 1]])
    onnx.checker.check_model(path, full_check=True)
    (found,) = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"ids": ids})
    lost = difference("embeddings", "y", found, table[torch.from_numpy(ids)], row)
    assert lost.within, lost.words


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
    assert size[bundle.root] < size[plain.root] / 3
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
        "onnx/vision_select_int8.onnx": "int8",
        "onnx/decoder_model_merged_int8.onnx": "int8",
    }
    vision = onnx.load(bundle.graph_path("vision_select"), load_external_data=False)
    assert "MatMulInteger" in {node.op_type for node in vision.graph.node}
    for function in vision.functions:  # the selection stays float32
        assert "MatMulInteger" not in {node.op_type for node in function.node}
    assert {entry.domain for entry in vision.opset_import} == {"", "resprune"}
    with Pipeline.load(bundle.root) as vlm:
        answer = vlm.ask(picture(1), QUESTION, max_new_tokens=STEPS, stream=False)
    assert len(answer.token_ids) == STEPS


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        *((variant, PRESETS["cpu"].dtype) for variant in ("qwen3", "internvl-qwen3", "gemma3")),
        ("clip-llama-wide", PRESETS["web"].dtype),
        ("clip-llama-wide", "vision=q4f16,decoder=q4f16,embed=q4f16"),
        ("clip-llama-wide", "q8"),
    ],
)
def test_what_is_packed_answers(tiny_bundle: Callable[..., Path], variant: str, dtype: str) -> None:
    """The export compares each graph with PyTorch, and each packed number with the checkpoint's."""
    bundle = read_bundle(tiny_bundle(variant, k=9, dtype=dtype))
    choice, parity = parse_dtype(dtype), bundle.manifest.parity
    for graph, spec in bundle.manifest.graphs.items():
        row = choice.of(graph)
        assert spec.precision == row.word
        model = onnx.load(bundle.graph_path(graph), load_external_data=False)
        nodes = [node for part in (model.graph, *model.functions) for node in part.node]
        packed = {node.op_type for node in nodes} & {"MatMulInteger", "MatMulNBits", "GatherBlockQuantized"}
        if row.bits:
            assert ("GatherBlockQuantized" if graph == "embed_tokens" else "MatMulNBits") in packed
        else:
            assert packed == ({"MatMulInteger"} if row.quantized else set())
        bits = {attribute.i for node in nodes for attribute in node.attribute if attribute.name == "bits"}
        assert bits <= {row.bits, row.head_bits}
        assert row.bits in bits or not row.bits
        cached = {tensor.dtype for tensor in spec.outputs if tensor.name.startswith("present.")}
        assert cached <= {row.element}
    equal, count = map(int, parity["text_positions"].split("/"))
    assert equal >= choice.of(DECODER).of_untaught().agreement * count
    equal, count = parity["weights"].split("/")
    assert equal == count
    with Pipeline.load(bundle.root) as vlm:
        answers = vlm.ask_batch([[picture(1)], [picture(2), picture(3)]], [QUESTION] * 2, max_new_tokens=5)
    assert [len(picks.kept_indices) for answer in answers for picks in answer.images] == [9] * 3
    assert answers[0].token_ids != answers[1].token_ids


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


def int8_rows(x: torch.Tensor) -> torch.Tensor:
    """What the rows are once each is rounded to ±127 of its largest number."""
    scale = x.abs().amax(dim=1, keepdim=True) / 127
    return (x / scale).round() * scale
