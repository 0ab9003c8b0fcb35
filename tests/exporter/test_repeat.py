"""Layers that are traced once: the graph must be the one that tracing every layer gives."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from resprune.exporter.checkpoint.checkpoint import resolve
from resprune.exporter.checkpoint.weightless import fake_mode
from resprune.exporter.families import split_model
from resprune.exporter.trace import repeat
from resprune.exporter.trace.tracer import trace
from resprune.exporter.trace.weights import find_weights, write_graph, write_weights
from resprune.exporter.verify.verifier import SIZES
from tests import tiny, tiny_qwen

ALTERNATING = {
    "use_sliding_window": True,
    "sliding_window": 8,
    "layer_types": ["full_attention", "sliding_attention"] * 2,
}
# Each with more layers than kinds of layer, and the kinds in turn.
MODELS: dict[str, tuple[Any, Any]] = {
    "Qwen2 with windows in every other layer": (
        tiny,
        replace(tiny.VARIANTS["dinov2-qwen2"], layers=4, language_options=ALTERNATING),
    ),
    "a tower of which three layers are used": (tiny, tiny.VARIANTS["clip-list"]),
    "Qwen2.5-VL": (tiny_qwen, replace(tiny_qwen.VARIANTS["qwen25"], depth=5)),
}
PIECES = [
    ("Qwen2 with windows in every other layer", "decoder", 4, 2),
    ("a tower of which three layers are used", "vision", 3, 1),
    ("Qwen2.5-VL", "vision", 5, 2),
]


@pytest.mark.parametrize(("model", "part", "layers", "kinds"), PIECES)
def test_the_graph_is_that_of_tracing_everything(model, part, layers, kinds, tmp_path, monkeypatch):
    module, variant = MODELS[model]
    checkpoint, mode = resolve(str(module.write_checkpoint(tmp_path / "model", variant))), fake_mode()
    components = split_model(checkpoint, torch.float16, mode)
    component, stored = getattr(components, part), find_weights(checkpoint, components.model)
    copied = set()
    copy = repeat._copied
    monkeypatch.setattr(
        repeat, "_copied", lambda node, values, index: copied.add(index) or copy(node, values, index)
    )
    inputs = component.samples(SIZES, torch.Generator().manual_seed(0))
    feeds = {spec.name: tensor.numpy() for spec, tensor in zip(component.inputs, inputs, strict=True)}
    graphs, outputs = [], []
    for name, once in (("whole", False), ("once", True)):
        traced = trace(component, components.model, mode, repeat=once)
        assert len(copied) == (layers - kinds if once else 0)
        write_graph(traced, tmp_path / f"{name}.onnx")
        write_weights(traced, tmp_path / f"{name}.onnx", stored)
        graphs.append(traced)
        session = onnxruntime.InferenceSession(tmp_path / f"{name}.onnx", providers=["CPUExecutionProvider"])
        outputs.append(session.run(None, feeds))
    whole, once_traced = graphs
    assert once_traced.weights == whole.weights
    assert operators(once_traced.model) == operators(whole.model)
    for spec, one, other in zip(component.outputs, *outputs, strict=True):
        np.testing.assert_array_equal(one, other, err_msg=spec.name)


def operators(model: Any) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def test_the_second_of_two_kinds_in_turn_is_found_by_how_it_is_called(tmp_path: Path):
    module, variant = MODELS["Qwen2 with windows in every other layer"]
    checkpoint, mode = resolve(str(module.write_checkpoint(tmp_path, variant))), fake_mode()
    decoder = split_model(checkpoint, torch.float32, mode).decoder
    with mode:
        inputs = [mode.from_tensor(tensor) for tensor in decoder.samples(SIZES, torch.Generator())]
        firsts = repeat.firsts_alike(decoder, inputs)
    assert firsts == [0, 1, 0, 1]
    names = ["inputs_embeds", "past_key_values.3.key", "present.2.value"]
    traced = [repeat.stand_in(name, firsts) for name in names]
    assert traced == ["inputs_embeds", "past_key_values.1.key", "present.0.value"]


def test_layers_that_differ_in_anything_but_weights_are_not_alike(tiny_checkpoint: Callable[[str], Path]):
    checkpoint, mode = resolve(str(tiny_checkpoint("clip-llama"))), fake_mode()
    components = split_model(checkpoint, torch.float32, mode)
    first, second = components.decoder.layers
    assert repeat._signature(first) == repeat._signature(second)
    second.input_layernorm.variance_epsilon *= 2  # type: ignore[union-attr, operator]
    assert repeat._signature(first) != repeat._signature(second)
