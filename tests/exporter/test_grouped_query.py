"""The decoder for ONNX Runtime alone: the same tokens as Hugging Face, with its cache written in place."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from resprune.exporter.export import export
from resprune.exporter.options import Options
from resprune.runtime.backends import onnxruntime as language_model
from resprune.runtime.bundle.files import read_bundle
from resprune.runtime.bundle.inspection import describe
from resprune.runtime.errors import ResPruneError
from resprune.runtime.pipeline import Pipeline
from tests.exporter import hugging_face_qwen as qwen
from tests.exporter.hugging_face import STEPS, picture
from tests.runtime.pipelines import OTHER, QUESTION
from tests.tiny import WIDE


@pytest.fixture(autouse=True)
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the cache runs out of room within an answer, several times."""
    monkeypatch.setattr(language_model, "CACHE_ROOM", 7)


@pytest.mark.parametrize("variant", WIDE)
def test_same_picks_and_tokens(variant, tiny_bundle, hugging_face):
    k = WIDE[variant]
    with Pipeline.load(tiny_bundle(variant, k=k, optimize="ort")) as vlm:
        answer = vlm.ask(picture(1), QUESTION, max_new_tokens=STEPS, stream=False)
        again = vlm.ask(picture(1), QUESTION, max_new_tokens=STEPS, stream=False)
    text = [answer.prompt.ids[position] for position in answer.prompt.text_positions]
    expected = hugging_face(variant).pruned(
        [picture(1)], answer.prompt.ids, text, k=k, positions="contiguous", steps=STEPS
    )
    assert answer.images[0].pick_order.tolist() == expected.pick_orders[0]
    assert answer.token_ids == expected.token_ids == again.token_ids
    assert len(set(answer.token_ids)) > 5, "a model that repeats itself shows nothing"


@pytest.mark.parametrize("attention", ["plain", "proportional"])
@pytest.mark.parametrize("variant", ["clip-llama-wide", "siglip-mistral-wide"])
def test_batch(variant, attention, tiny_bundle, hugging_face):
    """Two questions of different length at once: the shorter is padded on the left, under a window as well."""
    k, questions, pictures = WIDE[variant], [QUESTION, OTHER], [picture(4), picture(5)]
    proportional = attention == "proportional"
    with Pipeline.load(tiny_bundle(variant, k=k, optimize="ort", attention=attention)) as vlm:
        answers = vlm.ask_batch(pictures, questions, max_new_tokens=STEPS)
    assert len(answers[0].prompt.ids) != len(answers[1].prompt.ids)
    for answer, shown in zip(answers, pictures, strict=True):
        text = [answer.prompt.ids[position] for position in answer.prompt.text_positions]
        expected = hugging_face(variant).pruned(
            [shown],
            answer.prompt.ids,
            text,
            k=k,
            positions="contiguous",
            steps=STEPS,
            proportional=proportional,
        )
        assert (max(answer.images[0].kept_counts) > 1) == proportional
        assert answer.token_ids == expected.token_ids


def test_rotary_embeddings_of_three_axes(tiny_checkpoint, tiny_bundle):
    bundle = tiny_bundle("qwen25", k=5, optimize="ort")
    pictures = [qwen.picture(5, 7), qwen.picture(12, 3)]
    with Pipeline.load(bundle) as vlm:
        answer = vlm.ask(pictures, QUESTION, max_new_tokens=STEPS, stream=False)
    qwen.check(answer, qwen.HuggingFaceQwen(tiny_checkpoint("qwen25")), pictures, [5, 5])


def test_only_this_decoder_has_operators_of_onnx_runtime(tiny_bundle: Callable[..., Path]) -> None:
    bundle = read_bundle(tiny_bundle("clip-llama-wide", k=7, optimize="ort"))
    assert bundle.manifest.optimize == "ort"
    assert "of operators that only ONNX Runtime has" in describe(bundle)
    for name in bundle.manifest.graphs:
        model = onnx.load(bundle.graph_path(name), load_external_data=False)
        domains = {node.domain for node in model.graph.node} - {"", "resprune"}
        assert domains == ({"com.microsoft"} if name == "decoder_model_merged" else set())
    model = onnx.load(bundle.graph_path("decoder_model_merged"), load_external_data=False)
    layers = len(bundle.manifest.graphs["decoder_model_merged"].outputs) // 2
    counts = Counter(node.op_type for node in model.graph.node if node.domain == "com.microsoft")
    assert counts == {"GroupQueryAttention": layers, "RotaryEmbedding": 2 * layers}
    portable = read_bundle(tiny_bundle("clip-llama", k=7))
    assert portable.manifest.optimize is None
    assert "ONNX Runtime" not in describe(portable)
    model = onnx.load(portable.graph_path("decoder_model_merged"), load_external_data=False)
    assert {entry.domain for entry in model.opset_import} == {""}


def test_heads_that_the_operator_does_not_take_are_refused(tiny_checkpoint, tmp_path):
    with pytest.raises(
        ResPruneError, match="a multiple of 8 numbers, and this model's have 12; leave it out"
    ):
        export(str(tiny_checkpoint("clip-llama")), tmp_path / "bundle", Options(k=7, optimize="ort"))


def test_bf16_is_refused(tmp_path):
    with pytest.raises(ResPruneError, match="know no bf16; let dtype be fp16 or fp32"):
        export("demo", tmp_path / "bundle", Options(k=7, optimize="ort", dtype="bf16"))
