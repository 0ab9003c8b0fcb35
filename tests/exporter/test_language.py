"""The decoder's own promises, beside the parity tests' answers."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch

from resprune.exporter.language import additive_masks
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


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
@pytest.mark.parametrize("past", [0, 3])
def test_rows_of_one_image_see_each_other(kind: str, past: int) -> None:
    """Two images side by side, a window, padding on the left and counts: key by key as the rule says it."""
    numbers = torch.tensor([[0, 1, 1, 1, 2, 2, 0, 0], [0, 0, 0, 1, 1, 0, 2, 2]])
    batch, length = numbers.shape
    counts = torch.arange(1, past + length + 1).repeat(batch, 1)
    counts[1, : past + 2] = 0
    config = SimpleNamespace(model_type=kind, sliding_window=2)
    given = additive_masks(config, length, counts, numbers, proportional=True)
    forms = (
        {"sliding": given}
        if kind == "mistral"
        else {name.split("_")[0]: mask for name, mask in given.items()}
    )
    assert forms.keys() == ({"sliding"} if kind == "mistral" else {"full", "sliding"})
    of_key = torch.cat([torch.zeros(batch, past, dtype=torch.int64), numbers], dim=1)
    for name, mask in forms.items():
        assert mask.shape == (batch, 1, length, past + length)
        for row, query, key in product(range(batch), range(length), range(past + length)):
            place = past + query
            near = name == "full" or key > place - 2
            together = numbers[row, query] > 0 and numbers[row, query] == of_key[row, key]
            seen = counts[row, key] > 0 and (key <= place or together) and near
            expected = float(counts[row, key].float().log()) if seen else torch.finfo(torch.float32).min
            assert float(mask[row, 0, query, key]) == pytest.approx(expected)
