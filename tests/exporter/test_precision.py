"""bf16: what is narrow in the graphs, what stays float32, and what a machine without it is told."""

import re
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import ModelProto, TensorProto

from resprune.exporter.cli import _precision
from resprune.runtime.bundle.files import Bundle, read_bundle
from resprune.runtime.bundle.precisions import COMPONENTS, PRESETS, TABLE, parse_dtype
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
    ("dtype", "graph", "word"),
    [
        ("q4", "decoder_model_merged", "q4"),
        ("q4", "vision_select", "fp32"),
        ("q4", "embed_tokens", "fp32"),
        ("int8", "vision_select", "int8"),
        ("int8", "embed_tokens", "fp32"),
        ("q8", "token_select", "fp32"),
        ("q4f16", "embed_tokens", "fp16"),
        ("bf16", "embed_tokens", "bf16"),
        ("vision=int8,decoder=q4,embed=q8", "vision_encoder", "int8"),
        ("decoder=q4", "embed_tokens", "fp32"),
        ("decoder=q4f16", "vision_select", "fp16"),
    ],
)
def test_which_graphs_a_precision_changes(dtype: str, graph: str, word: str) -> None:
    assert parse_dtype(dtype).of(graph).word == word


@pytest.mark.parametrize(
    ("dtype", "says"),
    [
        ("q5", "'q5' is no precision; dtype takes fp32, fp16, bf16, int8, q8, q4, q4f16"),
        ("tower=q4", "each part should be a component"),
        ("decoder=q4,decoder=q8", "each at most once"),
        ("vision=fp16,decoder=q4", "with decoder=q4 the tower can be fp32, int8, q8, q4"),
        ("vision=int8,decoder=fp16", "with decoder=fp16 the tower can be fp16, q4f16; "),
        ("vision=bf16,decoder=q8", "with decoder=q8 the tower can be fp32, int8, q8, q4; "),
        ("embed=int8", "with decoder=fp32 the embeddings can be fp32, fp16, q8, q4; they are looked up"),
        ("decoder=q4,embed=bf16", "with decoder=q4 the embeddings can be fp32, fp16, q8, q4; "),
        ("decoder=fp16,embed=int8", "with decoder=fp16 the embeddings can be fp16, q8, q4, q4f16; "),
        ("vision=bf16,embed=fp32", "with decoder=bf16 the embeddings can be fp16, bf16, q8, q4; "),
    ],
)
def test_what_does_not_go_together_is_one_sentence(dtype: str, says: str) -> None:
    with pytest.raises(ResPruneError) as raised:
        parse_dtype(dtype)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("component", ["vision", "embed"])
@pytest.mark.parametrize("decoder", TABLE)
def test_a_refusal_names_what_is_taken(decoder: str, component: str) -> None:
    """Each word that goes with a decoder, and no other, stands in the message once."""
    named, taken = set(), []
    for word in TABLE:
        try:
            parse_dtype(f"decoder={decoder},{component}={word}")
            taken.append(word)
        except ResPruneError as error:
            named.add(str(error).partition(" can be ")[2].partition(";")[0])
    assert named == {", ".join(taken)}


def test_every_row_is_whole() -> None:
    """Its suffix is its own, what it stands for alone can be asked for by component, and the page has a row of it."""
    assert len({row.suffix for row in TABLE.values()}) == len(TABLE)
    page = (Path(__file__).parents[2] / "docs" / "precision.md").read_text()
    for row in TABLE.values():
        choice = parse_dtype(row.word)
        assert parse_dtype(",".join(f"{part}={getattr(choice, part)}" for part in COMPONENTS)) == choice
        assert re.search(rf"^\| {row.word} \|.*\| {re.escape(row.runs)} \|$", page, re.MULTILINE)
        assert 0 < row.atol <= 1
        (snr, agreement), (cache, logits), percent = row.untaught, row.layers, 100 * row.agreement
        noise = rf"{row.snr:g} dB( \({snr:g}\))? \| {cache:g} dB, {logits:g} dB"
        bounds = rf"{noise} \| {percent:g} %( \({100 * agreement:g}\))?"
        assert re.search(rf"^\| {row.word} \| {bounds} \|$", page, re.MULTILINE)
        assert row.untaught[0] > 2.5, "an output that lost three quarters has 2.5 dB"
        assert row.snr > 6.1, "an output that lost half has 6"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_precision_and_a_decoder(name: str) -> None:
    preset = PRESETS[name]
    assert parse_dtype(preset.dtype)
    assert _precision(name, None, None, decoder=True) == (preset.dtype, preset.optimize)
    assert _precision(name, None, None, decoder=False) == (preset.dtype, None)
    for given in (("q8", None), (None, "ort")):
        with pytest.raises(ResPruneError, match=f"--preset {name} says what --dtype and --optimize are"):
            _precision(name, *given, decoder=True)


def test_without_a_preset_both_are_as_given() -> None:
    assert _precision(None, None, None, decoder=True) == ("fp32", None)
    assert _precision(None, "q4", "ort", decoder=True) == ("q4", "ort")
