"""The decoder: a sequence continues what its prefill began, row by row, whatever others do meanwhile."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from resprune.runtime.backends.backend import Embedding
from resprune.runtime.backends.onnxruntime import OrtDecoder, OrtSequence, onnxruntime_decoder
from resprune.runtime.backends.session import OrtGraphs, SessionOptions
from resprune.runtime.bundle.files import Bundle, read_bundle
from resprune.runtime.bundle.manifest import TensorSpec
from resprune.runtime.errors import ResPruneError
from resprune.runtime.prompt.splice import Spliced

OPTIONS = SessionOptions(threads=1)
IDS = np.array([[1, 300, 301, 302, 303, 304, 305]])


@pytest.fixture(params=[None, "ort"])
def bundle(request: pytest.FixtureRequest, tiny_bundle: Callable[..., Path]) -> Bundle:
    """The portable decoder, and the one that writes its cache in place."""
    if request.param is None:
        return read_bundle(tiny_bundle("clip-llama", k=7, split=True))
    return read_bundle(tiny_bundle("clip-llama-wide", k=7, optimize=request.param))


@pytest.fixture
def decoder(bundle: Bundle) -> OrtDecoder:
    return onnxruntime_decoder(bundle, Embedding(OrtGraphs(bundle, OPTIONS)), OPTIONS)


def start(decoder: OrtDecoder, ids: np.ndarray, first_position: int = 0) -> OrtSequence:
    positions = np.arange(first_position, first_position + ids.shape[1])[None]
    return decoder.start(Spliced(decoder.embed_tokens(ids), positions, np.ones_like(ids)))


def test_steps_continue_the_prefill(decoder: OrtDecoder) -> None:
    whole = start(decoder, IDS, first_position=5).logits
    sequence = start(decoder, IDS[:, :4], first_position=5)
    for token in IDS[0, 4:]:
        sequence.step(np.array([token]))
    assert sequence.logits.shape == (1, 486)
    np.testing.assert_allclose(sequence.logits, whole, atol=1e-4)
    backwards = start(decoder, IDS[:, ::-1].copy()).logits
    assert np.abs(start(decoder, IDS).logits - backwards).max() > 0.1, "shows nothing"


def test_sequences_that_take_turns_know_nothing_of_each_other(decoder: OrtDecoder) -> None:
    prompts, tokens = (IDS[:, :3], IDS[:, :5]), (300, 311)
    alone = []
    for ids, token in zip(prompts, tokens, strict=True):
        sequence = start(decoder, ids)
        logits = [sequence.logits]
        for _ in range(3):
            sequence.step(np.array([token]))
            logits.append(sequence.logits)
        alone.append(logits)
    open_at_once = [start(decoder, ids) for ids in prompts]
    for step in range(4):
        for sequence, logits, token in zip(open_at_once, alone, tokens, strict=True):
            np.testing.assert_array_equal(sequence.logits, logits[step])
            sequence.step(np.array([token]))


def test_the_logits_of_a_run_stay_as_they_are_when_the_next_one_has_run(decoder: OrtDecoder) -> None:
    sequence = start(decoder, IDS[:, :3])
    first = sequence.logits
    sequence.step(np.array([300]))
    second = sequence.logits
    kept = [first.copy(), second.copy()]
    sequence.step(np.array([301]))
    np.testing.assert_array_equal([first, second], kept)


def test_what_fills_up_a_shorter_row_changes_nothing(decoder: OrtDecoder) -> None:
    short = IDS[:, :3]

    def two(sequence: OrtSequence, tokens: list[int]) -> list[np.ndarray]:
        first = sequence.logits
        sequence.step(np.array(tokens))
        return [first, sequence.logits]

    alone, short_alone = two(start(decoder, IDS), [310]), two(start(decoder, short), [311])
    embeds = decoder.embed_tokens(IDS).repeat(2, axis=0)
    embeds[1, :4] = 1e3  # anything at all
    embeds[1, 4:] = decoder.embed_tokens(short)[0]
    positions = np.array([[0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 1, 2]])
    mask = np.array([[1] * 7, [0] * 4 + [1] * 3])
    both = two(decoder.start(Spliced(embeds, positions, mask)), [310, 311])
    for together, first, second in zip(both, alone, short_alone, strict=True):
        np.testing.assert_allclose(together, np.concatenate([first, second]), atol=1e-4)


def test_a_closed_decoder_ends_its_sequences(decoder: OrtDecoder) -> None:
    sequence = start(decoder, IDS)
    decoder.close()
    with pytest.raises(ResPruneError, match="was closed before this answer was read to its end"):
        sequence.step(np.array([300]))


def test_a_graph_that_is_not_as_its_manifest_says_is_refused(bundle: Bundle) -> None:
    graph = bundle.manifest.graphs["decoder_model_merged"]
    past = TensorSpec("past_key_values.0.key", "float32", ("batch_size", "heads", "past_sequence_length", 12))
    graphs = bundle.manifest.graphs | {"decoder_model_merged": replace(graph, inputs=(past,))}
    wrong = Bundle(bundle.root, replace(bundle.manifest, graphs=graphs))
    with pytest.raises(ResPruneError, match=r"has no input past_key_values\.0\.key of the shape"):
        onnxruntime_decoder(wrong, Embedding(OrtGraphs(bundle, OPTIONS)), OPTIONS)


def test_inputs_that_a_graph_refuses_are_one_sentence(bundle: Bundle) -> None:
    embedding = Embedding(OrtGraphs(bundle, OPTIONS))
    with pytest.raises(ResPruneError, match="could not run embed_tokens") as raised:
        embedding(np.array([[1 << 40]]))
    assert "\n" not in str(raised.value)


def test_a_graph_that_the_bundle_does_not_have_is_named(bundle: Bundle) -> None:
    graphs = {name: graph for name, graph in bundle.manifest.graphs.items() if name != "embed_tokens"}
    with pytest.raises(ResPruneError, match="no graph embed_tokens"):
        Embedding(OrtGraphs(Bundle(bundle.root, replace(bundle.manifest, graphs=graphs)), OPTIONS))
