"""The decoder's own promises, beside the parity tests' answers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from resprune.runtime.bundle.files import read_bundle


@pytest.mark.parametrize("optimize", [None, "ort"])
def test_logits_are_the_last_position_s(tiny_bundle: Callable[..., Path], optimize: str | None) -> None:
    """A prompt at once gives what its last token gives after the others."""
    bundle = read_bundle(tiny_bundle("clip-llama-wide", k=7, optimize=optimize))
    spec = bundle.manifest.graphs["decoder_model_merged"]
    vocabulary = bundle.json("config.json")["text_config"]["vocab_size"]
    assert (spec.outputs[0].name, spec.outputs[0].shape) == ("logits", ("batch_size", 1, vocabulary))
    session = onnxruntime.InferenceSession(bundle.graph_path("decoder_model_merged"))
    width = spec.inputs[0].shape[2]
    embeds = np.random.default_rng(0).standard_normal((2, 5, width), np.float32)

    def run(start: int, end: int, past: list[np.ndarray]) -> list[np.ndarray]:
        positions = np.tile(np.arange(start, end), (2, 1))
        feeds = [embeds[:, start:end], np.ones((2, end), np.int64), positions, *past]
        return session.run(None, {tensor.name: feed for tensor, feed in zip(spec.inputs, feeds, strict=True)})

    empty = [np.zeros((2, tensor.shape[1], 0, tensor.shape[3]), np.float32) for tensor in spec.inputs[3:]]
    whole, *_ = run(0, 5, empty)
    _, *past = run(0, 4, empty)
    stepped, *_ = run(4, 5, past)
    assert whole.shape == (2, 1, vocabulary)
    np.testing.assert_allclose(whole, stepped, atol=1e-4)


@pytest.mark.parametrize("optimize", [None, "ort"])
def test_a_count_is_as_many_copies(tiny_bundle: Callable[..., Path], optimize: str | None) -> None:
    """A first row that counts for three is three rows in its place, in a prompt and in what follows it.

    Only the first: of copies further back each would see those before it.
    """
    # As other tests export them.
    options = {"optimize": optimize} if optimize else {"split": True}
    variant = "clip-llama-wide" if optimize else "clip-llama"
    bundle = read_bundle(tiny_bundle(variant, k=7, attention="proportional", **options))
    spec = bundle.manifest.graphs["decoder_model_merged"]
    session = onnxruntime.InferenceSession(bundle.graph_path("decoder_model_merged"))
    rows = np.random.default_rng(0).standard_normal((1, 5, spec.inputs[0].shape[2]), np.float32)
    counts = np.array([3, 1, 1, 1])
    logits = []
    for copies in (np.ones_like(counts), counts):
        past = [np.zeros((1, tensor.shape[1], 0, tensor.shape[3]), np.float32) for tensor in spec.inputs[3:]]
        mask = np.repeat(counts // copies, copies)
        places = np.repeat(np.arange(4), copies)
        for embeds, positions in ((rows[:, places], places), (rows[:, 4:], np.array([4]))):
            feeds = [embeds, mask[None], positions[None], *past]
            names = [tensor.name for tensor in spec.inputs]
            answered, *past = session.run(None, dict(zip(names, feeds, strict=True)))
            logits.append(answered)
            mask = np.append(mask, 1)
    for counted, copied in zip(logits[:2], logits[2:], strict=True):
        np.testing.assert_allclose(counted, copied, atol=1e-4)
