"""The decoder behind its seam: steps continue what the prefill began, row by row."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from resprune.runtime.backends.onnxruntime import Embedding, OrtLanguageModel
from resprune.runtime.backends.session import OrtGraphs, SessionOptions
from resprune.runtime.bundle.files import Bundle, read_bundle
from resprune.runtime.bundle.manifest import TensorSpec
from resprune.runtime.errors import ResPruneError

OPTIONS = SessionOptions(threads=1)
IDS = np.array([[1, 300, 301, 302, 303, 304, 305]])


@pytest.fixture(params=[None, "ort"])
def bundle(request: pytest.FixtureRequest, tiny_bundle: Callable[..., Path]) -> Bundle:
    """The portable decoder, and the one that writes its cache in place."""
    if request.param is None:
        return read_bundle(tiny_bundle("clip-llama", k=7, split=True))
    return read_bundle(tiny_bundle("clip-llama-wide", k=7, optimize=request.param))


@pytest.fixture
def model(bundle: Bundle) -> OrtLanguageModel:
    return OrtLanguageModel(bundle, Embedding(OrtGraphs(bundle, OPTIONS)), OPTIONS)


def prefill(model: OrtLanguageModel, ids: np.ndarray, first_position: int = 0) -> np.ndarray:
    positions = np.arange(first_position, first_position + ids.shape[1])[None]
    return model.prefill(model._embedding(ids), positions, np.ones_like(ids))


def test_steps_continue_the_prefill(model: OrtLanguageModel) -> None:
    whole = prefill(model, IDS, first_position=5)
    prefill(model, IDS[:, :4], first_position=5)
    for token in IDS[0, 4:]:
        stepped = model.step(np.array([token]))
    assert stepped.shape == (1, 486)
    np.testing.assert_allclose(stepped, whole, atol=1e-4)
    assert np.abs(prefill(model, IDS) - prefill(model, IDS[:, ::-1].copy())).max() > 0.1, "shows nothing"


def test_a_prefill_forgets_the_sequence_before(model: OrtLanguageModel) -> None:
    fresh = prefill(model, IDS[:, :3])
    model.step(np.array([300]))
    np.testing.assert_array_equal(prefill(model, IDS[:, :3]), fresh)


def test_the_logits_of_a_run_stay_as_they_are_when_the_next_one_has_run(model: OrtLanguageModel) -> None:
    first = prefill(model, IDS[:, :3])
    second = model.step(np.array([300]))
    kept = [first.copy(), second.copy()]
    model.step(np.array([301]))
    np.testing.assert_array_equal([first, second], kept)


def test_what_fills_up_a_shorter_row_changes_nothing(model: OrtLanguageModel) -> None:
    short = IDS[:, :3]
    alone = [prefill(model, IDS), model.step(np.array([310]))]
    short_alone = [prefill(model, short), model.step(np.array([311]))]
    embeds = model._embedding(IDS).repeat(2, axis=0)
    embeds[1, :4] = 1e3  # anything at all
    embeds[1, 4:] = model._embedding(short)[0]
    positions = np.array([[0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 1, 2]])
    mask = np.array([[1] * 7, [0] * 4 + [1] * 3])
    both = [model.prefill(embeds, positions, mask), model.step(np.array([310, 311]))]
    for together, first, second in zip(both, alone, short_alone, strict=True):
        np.testing.assert_allclose(together, np.concatenate([first, second]), atol=1e-4)


def test_a_cache_without_fixed_heads_is_refused(bundle: Bundle) -> None:
    graph = bundle.manifest.graphs["decoder_model_merged"]
    past = TensorSpec("past_key_values.0.key", "float32", ("batch_size", "heads", "past_sequence_length", 12))
    graphs = bundle.manifest.graphs | {"decoder_model_merged": replace(graph, inputs=(past,))}
    wrong = Bundle(bundle.root, replace(bundle.manifest, graphs=graphs))
    with pytest.raises(ResPruneError, match=r"past_key_values\.0\.key should have the shape"):
        OrtLanguageModel(wrong, Embedding(OrtGraphs(bundle, OPTIONS)), OPTIONS)


def test_inputs_that_a_graph_refuses_are_one_sentence(bundle: Bundle) -> None:
    embedding = Embedding(OrtGraphs(bundle, OPTIONS))
    with pytest.raises(ResPruneError, match="could not run embed_tokens") as raised:
        embedding(np.array([[1 << 40]]))
    assert "\n" not in str(raised.value)


def test_a_graph_that_the_bundle_does_not_have_is_named(bundle: Bundle) -> None:
    graphs = {name: graph for name, graph in bundle.manifest.graphs.items() if name != "embed_tokens"}
    with pytest.raises(ResPruneError, match="no graph embed_tokens"):
        Embedding(OrtGraphs(Bundle(bundle.root, replace(bundle.manifest, graphs=graphs)), OPTIONS))
