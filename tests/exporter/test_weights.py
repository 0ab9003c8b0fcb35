"""Weights written beside a graph that was traced without them, and found under every name they may be stored by."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from resprune.exporter.checkpoint.checkpoint import resolve
from resprune.exporter.checkpoint.shards import StoredTensor
from resprune.exporter.checkpoint.weightless import fake_mode, fake_parameter
from resprune.exporter.components import Component
from resprune.exporter.families import split_model
from resprune.exporter.trace import weights as weights_module
from resprune.exporter.trace.precision import TORCH
from resprune.exporter.trace.tracer import Traced, trace
from resprune.exporter.trace.weights import (
    OVERHEAD_BYTES,
    PAGE,
    SMALL,
    bytes_needed,
    data_size,
    find_weights,
    write_graph,
    write_weights,
)
from resprune.exporter.verify.weights import Comparison
from resprune.runtime.bundle.files import describe_files, read_bundle
from resprune.runtime.bundle.manifest import TensorSpec
from resprune.runtime.bundle.precisions import parse_dtype
from resprune.runtime.errors import ResPruneError

WIDE = 160  # 160 × 160 float32 is above the size from which weights lie on pages


class Whole(nn.Module):
    """Two linear layers, one with the first's weight transposed, an unused one, and a computed buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDE, WIDE)
        self.second = nn.Linear(WIDE, 3, bias=False)
        self.unused = nn.Linear(5, 5)
        self.register_buffer("offset", torch.arange(3.0), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.second(torch.relu(self.first(x))) + self.offset,)


@pytest.fixture(scope="module")
def traced() -> Traced:
    whole, mode = Whole(), fake_mode()
    with mode:
        for module in (whole.first, whole.second, whole.unused):
            for name, parameter in module.named_parameters():
                setattr(module, name, fake_parameter(parameter.shape, torch.float32))
    spec = TensorSpec("x", "float32", ("batch_size", "sequence_length", WIDE))
    out = TensorSpec("y", "float32", ("batch_size", "sequence_length", 3))
    component = Component(
        "component",
        whole,
        (spec,),
        (out,),
        lambda sizes, generator: (torch.randn(2, 3, WIDE),),
        lambda *_: (),
    )
    return trace(component, whole, mode)


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, StoredTensor]:
    """Weights of `Whole` in half precision, so that writing them casts."""
    places = {}
    for name, tensor in Whole().state_dict().items():
        (tmp_path / name).write_bytes(tensor.half().numpy().tobytes())
        places[name] = StoredTensor(
            tmp_path / name, torch.float16, tuple(tensor.shape), 0, tensor.numel() * 2
        )
    return places


def test_a_graph_without_weights(traced):
    assert {name: use.transposed for name, use in traced.weights.items()} == {
        "first.weight.T": True,
        "first.bias": False,
        "second.weight.T": True,
    }
    assert traced.model.ByteSize() < 10_000
    assert "Transpose" not in {node.op_type for node in traced.model.graph.node}
    assert [
        axis.dim_param or axis.dim_value for axis in traced.model.graph.input[0].type.tensor_type.shape.dim
    ] == [
        "batch_size",
        "sequence_length",
        WIDE,
    ]


def test_weights_are_cast_transposed_aligned_and_complete(traced, stored, tmp_path, monkeypatch):
    monkeypatch.setattr("resprune.exporter.trace.weights.CHUNK_BYTES", 1000)  # many chunks
    folder = tmp_path / "out"
    folder.mkdir()
    path = folder / "graph.onnx"
    written = []
    hashed = write_graph(traced, path)
    with Comparison(path, stored) as comparison:

        def progress(count: int, complete: int) -> None:
            assert complete <= (folder / "graph.onnx_data").stat().st_size
            written.append(count)
            comparison.advance(complete)

        hashed |= write_weights(traced, path, stored, progress)
        assert comparison.finish() == ([], 3)
    assert {file.name: spec for file, spec in hashed.items()} == describe_files(folder)
    onnx.checker.check_model(str(path), full_check=True)
    assert sum(written) == sum(
        4 * stored[parameter].nbytes // 2 for use in traced.weights.values() for parameter in use.parameters
    )
    assert (folder / "graph.onnx_data").stat().st_size == data_size(traced)
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if where:
            assert where["location"] == "graph.onnx_data"
            large = int(where["length"]) >= 64 << 10
            assert int(where["offset"]) % (PAGE if large else SMALL) == 0

    whole = Whole()
    whole.load_state_dict({name: place.read().float() for name, place in stored.items()})
    x = torch.randn(4, 5, WIDE, generator=torch.Generator().manual_seed(1))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": x.numpy()})
    np.testing.assert_allclose(got, whole(x)[0].detach().numpy(), atol=1e-5)


def rewrite(root: Path, change: Callable[[dict[str, Tensor]], None], copy: Path) -> Path:
    """A copy of a single-file checkpoint with its weights changed."""
    shutil.copytree(root, copy)
    weights = load_file(copy / "model.safetensors")
    change(weights)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    return copy


NORM = "language_model.model.norm.weight"
CHANGES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda weights: weights.pop(NORM), r"1 missing \(model\.language_model\.norm\.weight\)"),
    "left over": (lambda weights: weights.update(extra=torch.ones(1)), r"1 left over \(.*extra\)"),
    "of another shape": (
        lambda weights: weights.update({NORM: torch.ones(7)}),
        r"norm\.weight in .* has shape \[7\] where the config asks for \[48\]",
    ),
}


@pytest.mark.parametrize(("change", "sentence"), CHANGES.values(), ids=CHANGES.keys())
def test_weights_that_do_not_fit_are_named(change, sentence, tiny_checkpoint, tmp_path):
    checkpoint = resolve(str(rewrite(tiny_checkpoint("clip-llama"), change, tmp_path / "copy")))
    components = split_model(checkpoint, torch.float32, fake_mode())
    with pytest.raises(ResPruneError, match=sentence):
        find_weights(checkpoint, components.model)


def test_every_age_of_weight_names_is_understood(tiny_checkpoint):
    """The list variant is stored under the names of transformers 4, with `vision_model` inside the tower's."""
    checkpoint = resolve(str(tiny_checkpoint("clip-list")))
    assert any(name.startswith("vision_tower.vision_model.") for name in checkpoint.weights)
    components = split_model(checkpoint, torch.float32, fake_mode())
    stored = find_weights(checkpoint, components.model)
    assert stored["lm_head.weight"] == stored["model.language_model.embed_tokens.weight"], "tied"


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("clip-llama", {"k": 7}),
        ("clip-llama", {"k": 7, "split": True}),
        ("clip-llama", {"k": 7, "dtype": "fp16"}),
        ("clip-llama", {"k": 7, "dtype": "int8"}),
        ("clip-llama", {"k": 7, "dtype": "q4"}),
        ("qwen25", {"k": 6, "dtype": "fp16"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_the_bytes_needed_are_at_least_those_written_and_not_many_more(
    variant, options, tiny_checkpoint, tiny_bundle
):
    checkpoint, dtype = resolve(str(tiny_checkpoint(variant))), options.get("dtype", "fp32")
    choice = parse_dtype(dtype)
    components = split_model(checkpoint, TORCH[choice.element], fake_mode())
    needed = bytes_needed(components, choice, 32)
    bundle = read_bundle(tiny_bundle(variant, **options))
    owners = {graph.weights: name for name, graph in bundle.manifest.graphs.items() if graph.weights}
    graphs = [onnx.load(bundle.graph_path(name), load_external_data=False) for name in owners.values()]
    stored = [tensor for graph in graphs for tensor in weights_module._external(graph)]
    data = sum(map(weights_module._byte_count, stored))
    assert data <= needed - OVERHEAD_BYTES <= 1.3 * data
    assert sum(spec.size for spec in bundle.manifest.files.values()) <= needed
