"""A decoder proven by layers: what is compared, and that each kind of mistake shows."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from resprune.exporter.export import export
from resprune.exporter.options import Options
from resprune.exporter.trace import writer as writer_module
from resprune.exporter.verify.layers import chosen_layers, unlike_layers
from resprune.runtime.bundle.files import read_bundle
from resprune.runtime.cli import main
from resprune.runtime.errors import ResPruneError
from tests import tiny

# Five layers whose attention takes turns, so that the first, the last, and the last of the other kind are run.
VARIANT = replace(
    tiny.VARIANTS["dinov2-qwen2"],
    layers=5,
    language_options={
        "use_sliding_window": True,
        "sliding_window": 3,
        "layer_types": ["full_attention", "sliding_attention"] * 2 + ["full_attention"],
    },
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("layers") / "model", VARIANT)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(
        str(checkpoint), tmp_path_factory.mktemp("layers") / "bundle", Options(k=5, verify="layers")
    )


@pytest.mark.parametrize(
    ("kinds", "chosen"),
    [
        (None, [0, 3]),
        (["a"] * 4, [0, 3]),
        (["a", "b", "a", "b"], [0, 2, 3]),
        (["a", "b", "b", "a"], [0, 2, 3]),
    ],
)
def test_the_layers_that_are_run(kinds, chosen):
    assert chosen_layers(SimpleNamespace(num_hidden_layers=4, layer_types=kinds)) == chosen


def test_the_manifest_says_how_it_was_verified(bundle):
    manifest = read_bundle(bundle).manifest
    assert manifest.parity["level"] == "layers"
    assert manifest.parity["layers"] == [0, 3, 4]
    equal, total = manifest.parity["weights"].split("/")
    assert equal == total
    outputs = {"logits", *(f"present.{layer}.{part}" for layer in (0, 3, 4) for part in ("key", "value"))}
    assert set(manifest.parity["outputs"]["decoder_model_merged"]) == outputs
    assert not [name for name in manifest.files if "layers" in name], "what was cut out is gone"


def decoder(bundle: Path) -> onnx.ModelProto:
    return onnx.load(bundle / "onnx" / "decoder_model_merged.onnx", load_external_data=False)


def rewire(model: onnx.ModelProto, renamed: dict[str, str]) -> None:
    """Have nodes take other values than they do."""
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = renamed.get(name, name)


WEIGHT = "model.language_model.layers.{}.mlp.up_proj.weight.T"


def exchange(one: str, other: str) -> dict[str, str]:
    return {one: other, other: one}


@pytest.mark.parametrize(
    ("renamed", "wrong"),
    [
        (exchange(WEIGHT.format(1), WEIGHT.format(2)), [1, 2]),
        (exchange("past_key_values.1.key", "past_key_values.2.key"), [1, 2]),
        ({"hidden_states.2": "hidden_states.1"}, [2]),
    ],
    ids=["weights", "past", "states"],
)
def test_layers_that_change_places_are_named(renamed, wrong, bundle, tmp_path):
    model = decoder(bundle)
    onnx.save(model, tmp_path / "decoder.onnx")
    assert unlike_layers(tmp_path / "decoder.onnx", [0, 3, 4], 5) == []
    rewire(model, renamed)
    onnx.save(model, tmp_path / "decoder.onnx")
    assert unlike_layers(tmp_path / "decoder.onnx", [0, 3, 4], 5) == wrong


def test_an_operator_that_differs_in_one_layer_is_named(bundle, tmp_path):
    model = decoder(bundle)
    softmax = [node for node in model.graph.node if node.op_type == "Softmax"]
    softmax[2].attribute[0].i = 1
    onnx.save(model, tmp_path / "decoder.onnx")
    assert unlike_layers(tmp_path / "decoder.onnx", [0, 3, 4], 5) == [2]


def flip(path: Path, weight: str) -> None:
    """Change one number in the middle of a weight."""
    model = onnx.load(path, load_external_data=False)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == weight)
    place = {entry.key: entry.value for entry in tensor.external_data}
    with (path.parent / place["location"]).open("r+b") as file:
        file.seek(int(place["offset"]) + int(place["length"]) // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))


def cross(path: Path, weight: str) -> None:
    """Two layers' weights change places."""
    model = onnx.load(path, load_external_data=False)
    rewire(model, exchange(weight, weight.replace("layers.2.", "layers.1.")))
    onnx.save(model, path)


def turn(path: Path, weight: str) -> None:
    """Every layer alike, and wrong: the softmax goes over another axis."""
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "Softmax":
            node.attribute[0].i = -2
    onnx.save(model, path)


MISTAKES = {
    "one number of a layer that is not run": (
        flip,
        r"1 of \d+ weights are not the checkpoint's.*layers\.2\.mlp",
    ),
    "two layers' weights change places": (cross, "computes something else in layer 1, 2 than in the others"),
    "every layer": (turn, r"decoder_model_merged +logits .* <-"),
}


def spoil(monkeypatch: pytest.MonkeyPatch, mistake: Callable[[Path, str], None], weight: str) -> None:
    """Have an export's decoder get a mistake as soon as it is written."""
    write_weights = writer_module.write_weights

    def wrong(traced: Any, path: Path, stored: Any, progress: Any) -> Any:
        written = write_weights(traced, path, stored)
        if path.name == "decoder_model_merged.onnx":
            mistake(path, weight)
        for spec in written.values():
            progress(spec.size, spec.size)
        return written

    monkeypatch.setattr(writer_module, "write_weights", wrong)


@pytest.mark.parametrize(("mistake", "told"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_status_1_and_no_bundle(mistake, told, checkpoint, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, mistake, WEIGHT.format(2))
    arguments = ["export", str(checkpoint), str(tmp_path / "out"), "-k", "5", "--verify", "layers"]
    assert main(arguments) == 1
    assert re.search(told, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its bundle, whose decoder is that for ONNX Runtime."""
    root = tmp_path_factory.mktemp("packed")
    checkpoint = tiny.write_checkpoint(root / "model", replace(VARIANT, hidden=64))
    options = Options(k=5, verify="layers", optimize="ort")
    return checkpoint, export(str(checkpoint), root / "bundle", options)


GATE_UP = (
    "+".join(f"model.language_model.layers.{{0}}.mlp.{name}_proj.weight" for name in ("gate", "up")) + ".T"
)


def test_layers_of_packed_products(packed, tmp_path):
    """Weights of another layer, and the parts of a product that change places, are named."""
    _, bundle = packed
    manifest = read_bundle(bundle).manifest
    assert (manifest.parity["level"], manifest.parity["layers"]) == ("layers", [0, 3, 4])
    path = tmp_path / "decoder.onnx"
    onnx.save(decoder(bundle), path)
    assert unlike_layers(path, [0, 3, 4], 5) == []
    model = decoder(bundle)
    rewire(model, exchange(GATE_UP.format(1), GATE_UP.format(2)))
    onnx.save(model, path)
    assert unlike_layers(path, [0, 3, 4], 5) == [1, 2]
    model = decoder(bundle)
    (product,) = (node for node in model.graph.node if GATE_UP.format(2) in node.input)
    (split,) = (node for node in model.graph.node if product.output[0] in node.input)
    split.output[:] = split.output[::-1]
    onnx.save(model, path)
    assert unlike_layers(path, [0, 3, 4], 5) == [2]


def test_one_number_of_a_packed_weight_is_status_1(packed, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, flip, GATE_UP.format(2))
    arguments = ["-k", "5", "--verify", "layers", "--optimize", "ort"]
    assert main(["export", str(packed[0]), str(tmp_path / "out"), *arguments]) == 1
    assert re.search(r"1 of \d+ weights are not the checkpoint's.*layers\.2\.mlp", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_a_graph_without_its_hidden_states_cannot_be_verified_so(bundle, tmp_path):
    model = decoder(bundle)
    for node in model.graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                names[place] = "fused" if name == "hidden_states.2" else name
    onnx.save(model, tmp_path / "decoder.onnx")
    with pytest.raises(ResPruneError, match=r"no value hidden_states\.2, so .*; use --verify full"):
        unlike_layers(tmp_path / "decoder.onnx", [0, 3, 4], 5)
