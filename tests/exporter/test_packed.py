"""Products of the same rows become one, computing what they did, of numbers that are the same to the bit."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from resprune.exporter.checkpoint.shards import StoredTensor
from resprune.exporter.trace.packed import pack
from resprune.exporter.trace.quantize import quantize
from resprune.exporter.trace.tracer import Traced, Weight, unwritten
from resprune.exporter.trace.weights import write_graph, write_weights
from resprune.exporter.verify.weights import Comparison
from resprune.runtime.bundle.files import read_bundle
from resprune.runtime.bundle.precisions import TABLE, Precision
from tests.tiny import WIDE

K = 70  # of q4 two blocks of 32 and a part of one
ROWS = {"a": 40, "b": 24, "c": 24, "alone": 40, "tied": 24}
PARTS = ("a", "b", "c")


def traced(dtype: torch.dtype = torch.float32) -> Traced:
    """Three products of x and one of y; and two of x and y by one weight, which belongs to neither."""
    half = dtype != torch.float32
    nodes = [helper.make_node("Cast", [name], [f"{name}.cast"], to=TensorProto.FLOAT16) for name in "xy"]
    nodes = nodes if half else []
    ending = ".cast" if half else ""
    products = [("x", name, f"x_{name}") for name in (*PARTS, "tied")]
    for rows, name, out in [*products, ("y", "alone", "y_alone"), ("y", "tied", "y_tied")]:
        product = f"{out}.half" if half else out
        nodes.append(helper.make_node("MatMul", [rows + ending, f"{name}.T"], [product]))
        if half:
            nodes.append(helper.make_node("Cast", [product], [out], to=TensorProto.FLOAT))
    weights = {f"{name}.T": Weight((name,), dtype, transposed=True) for name in ROWS}
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info(name, 1, ("rows", K)) for name in "xy"],
        [
            helper.make_tensor_value_info(out, 1, ("rows", ROWS[out[2:]]))
            for out in ("x_a", "x_b", "x_c", "x_tied", "y_alone", "y_tied")
        ],
        [unwritten(weight, (K, ROWS[weight.parameters[0]])) for weight in weights.values()],
    )
    return Traced(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), weights
    )


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, StoredTensor]:
    generator = torch.Generator().manual_seed(0)
    places = {}
    for name, rows in ROWS.items():
        path = tmp_path / f"{name}.source"
        path.write_bytes(torch.randn(rows, K, generator=generator).half().numpy().tobytes())
        places[name] = StoredTensor(path, torch.float16, (rows, K), 0, path.stat().st_size)
    return places


def written(graph: Traced, path: Path, stored: dict[str, StoredTensor]) -> tuple[list[str], int]:
    """Write a graph and its weights; returns which are wrong, and how many there are."""
    path.parent.mkdir(exist_ok=True)
    write_graph(graph, path)
    write_weights(graph, path, stored)
    return compared(path, stored)


def compared(path: Path, stored: dict[str, StoredTensor]) -> tuple[list[str], int]:
    with Comparison(path, stored) as comparison:
        comparison.advance(path.with_name(f"{path.name}_data").stat().st_size)
        return comparison.finish()


def run(path: Path) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    inputs = {name: torch.randn(3, K, generator=generator).numpy() for name in "xy"}
    return [*ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, inputs)]


def numbers(path: Path) -> dict[str, Any]:
    return {
        tensor.name: numpy_helper.to_array(tensor, str(path.parent))
        for tensor in onnx.load(path, load_external_data=False).graph.initializer
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_product_where_there_were_three(dtype, stored, tmp_path, monkeypatch):
    """Written a few columns at a time; cast once where half was cast thrice; the others stay as they were."""
    monkeypatch.setattr("resprune.exporter.trace.weights.CHUNK_BYTES", 1000)
    plain, packed = tmp_path / "plain" / "graph.onnx", tmp_path / "packed" / "graph.onnx"
    assert written(traced(dtype), plain, stored) == ([], 5)
    assert written(pack(traced(dtype)), packed, stored) == ([], 3)
    onnx.checker.check_model(str(packed), full_check=True)
    model = onnx.load(packed, load_external_data=False)
    casts = {"Cast": 2 + 4} if dtype == torch.float16 else {}
    assert Counter(node.op_type for node in model.graph.node) == {"MatMul": 4, "Split": 1} | casts
    one, other = numbers(plain), numbers(packed)
    side_by_side = np.concatenate([one[f"{name}.T"] for name in PARTS], axis=1)
    np.testing.assert_array_equal(other["a+b+c.T"], side_by_side)
    assert [*other][:3] == ["a+b+c.T", "alone.T", "tied.T"], "in the place of the first of them"
    for ours, theirs in zip(run(packed), run(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=2e-3 if casts else 1e-5)


@pytest.mark.parametrize("form", ["int8", "q4"])
def test_what_is_quantized_is_the_same_to_the_bit(form, stored, tmp_path, monkeypatch):
    monkeypatch.setattr("resprune.exporter.trace.quantize.CHUNK_BYTES", 4000)
    plain, packed = tmp_path / "plain" / "graph.onnx", tmp_path / "packed" / "graph.onnx"
    assert written(quantize(traced(), as_layers(form)), plain, stored)[0] == []
    assert written(quantize(pack(traced()), as_layers(form)), packed, stored) == (
        [],
        9 if form == "q4" else 6,
    )
    one, other = numbers(plain), numbers(packed)
    for part, axis in (
        (form, 1 if form == "int8" else 0),
        (f"{form}_scales", 0),
        *([("q4_zeros", 0)] if form == "q4" else []),
    ):
        side_by_side = np.concatenate([one[f"{name}.{part}"] for name in PARTS], axis=axis)
        np.testing.assert_array_equal(other[f"a+b+c.{part}"], side_by_side)
    for ours, theirs in zip(run(packed), run(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["fp32", "int8", "q4"])
def test_parameters_in_each_other_s_place_are_found(form, stored, tmp_path):
    """b and c are of one shape: nothing but their numbers tells them apart."""
    graph = pack(traced()) if form == "fp32" else quantize(pack(traced()), as_layers(form))
    path, name = tmp_path / "packed" / "graph.onnx", "a+b+c." + ("T" if form == "fp32" else form)
    assert written(graph, path, stored)[0] == []
    assert compared(path, stored | {"b": stored["c"], "c": stored["b"]})[0] == [name]
    assert compared(path, stored | {"b": stored["a"]})[0] == [name], "of another shape"
    assert name in compared(path, {key: stored[key] for key in stored if key != "c"})[0], (
        "not in the checkpoint"
    )


def as_layers(form: str) -> Precision:
    """The precision, for graphs whose products are all outputs: they are no heads."""
    return replace(TABLE[form], head_bits=TABLE[form].bits)


def names(module: str, projections: Sequence[str], layer: int, ending: str) -> str:
    stem = f"model.language_model.layers.{layer}.{module}."
    return "+".join(f"{stem}{projection}_proj.weight" for projection in projections) + ending


@pytest.mark.parametrize(
    ("dtype", "product", "ending"),
    [
        ("fp32", "MatMul", ".T"),
        ("fp16", "MatMul", ".T"),
        ("int8", "MatMulInteger", ".int8"),
        ("q4", "MatMulNBits", ".q4"),
    ],
)
@pytest.mark.parametrize("variant", ["clip-llama-wide", "siglip-mistral-wide", "qwen25"])
def test_four_products_a_layer(
    variant: str, dtype: str, product: str, ending: str, tiny_bundle: Callable[..., Path]
) -> None:
    """And every weight of the bundle was compared; that it answers as PyTorch does is in test_grouped_query.py."""
    bundle = read_bundle(tiny_bundle(variant, k=WIDE.get(variant, 5), optimize="ort", dtype=dtype))
    model = onnx.load(bundle.graph_path("decoder_model_merged"), load_external_data=False)
    layers = sum(node.op_type == "GroupQueryAttention" for node in model.graph.node)
    products = [node.input[1] for node in model.graph.node if node.op_type == product]
    wanted = [
        names(module, projections, layer, ending)
        for layer in range(layers)
        for module, projections in (
            ("self_attn", "qkv"),
            ("self_attn", "o"),
            ("mlp", ("gate", "up")),
            ("mlp", ("down",)),
        )
    ]
    head = {"q4": ".q8"}.get(dtype, ending)
    assert products == [*wanted, f"lm_head.weight{head}"]
    splits = [node for node in model.graph.node if node.op_type == "Split" and ".packed" in node.input[0]]
    assert len(splits) == 2 * layers
    equal, total = bundle.manifest.parity["weights"].split("/")
    assert equal == total
    if dtype in ("fp32", "fp16"):
        assert bundle.manifest.parity["greedy_tokens"] == "32/32"


def test_onnx_runtime_still_recognises_what_it_fuses(
    tiny_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    bundle = read_bundle(
        tiny_bundle("clip-llama-wide", k=WIDE["clip-llama-wide"], optimize="ort", dtype="int8")
    )
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(
        bundle.graph_path("decoder_model_merged"), options, providers=["CPUExecutionProvider"]
    )
    model = onnx.load(tmp_path / "optimized.onnx", load_external_data=False)
    counts = Counter(node.op_type for node in model.graph.node)
    layers = counts["GroupQueryAttention"]
    assert counts["SimplifiedLayerNormalization"] == 2 * layers + 1
    assert counts["QuickGelu"] == layers
    assert counts["MatMulInteger"] == 4 * layers + 1
