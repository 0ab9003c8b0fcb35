"""Engines of classic TensorRT carry the selection's kernel where it can be had, up to the border of TensorRT itself."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from resprune.exporter.tensorrt import engines, plugin
from resprune.exporter.tensorrt.engines import build
from resprune.exporter.tensorrt.plugin import plugin_versions, with_plugin
from resprune.graphs.kernels import tensorrt_plugin
from resprune.runtime.backends.cuda import Gpu
from resprune.runtime.bundle.files import read_bundle

GPU = Gpu("Stand-in", (8, 6), (13, 0), 84)


@pytest.fixture
def tiny(tiny_bundle: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle("clip-llama", k=7, split=True), tmp_path / "bundle"))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, int]]]:
    """A GPU, and a TensorRT that takes plugins; the registrations that were made."""
    made: list[dict[str, int]] = []
    monkeypatch.setattr(plugin, "gpu_at_hand", lambda: GPU)
    monkeypatch.setattr(tensorrt_plugin, "register", lambda **arguments: made.append(arguments))
    plugin._registered.cache_clear()
    yield made
    plugin._registered.cache_clear()


def test_the_plugin_is_registered_once_for_the_gpu_at_hand(tiny: Path, registered: list[Any]) -> None:
    for name in ("vision_select", "token_select"):
        versions, note = plugin_versions(tiny / "onnx" / f"{name}.onnx", "tensorrt", 16)
        assert versions.keys() == {"triton"}
        assert note == "selection by its kernel"
    assert registered == [{"capability": 86, "processors": 84}]


@pytest.mark.parametrize(
    ("name", "flavour", "tokens", "note"),
    [
        ("token_select", "tensorrt-rtx", 16, ""),
        ("embed_tokens", "tensorrt", 16, ""),
        ("token_select", "tensorrt", 40_000, "its function (the kernel takes 32,768 tokens, not 40,000)"),
    ],
)
def test_elsewhere_the_function_stays(
    tiny: Path, registered: list[Any], name: str, flavour: str, tokens: int, note: str
) -> None:
    versions, said = plugin_versions(tiny / "onnx" / f"{name}.onnx", flavour, tokens)
    assert versions == {}
    assert said.endswith(note)
    assert bool(said) == bool(note)


def test_a_tensorrt_without_plugins_builds_the_function(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "gpu_at_hand", lambda: GPU)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    plugin._registered.cache_clear()
    versions, note = plugin_versions(tiny / "onnx" / "token_select.onnx", "tensorrt", 16)
    plugin._registered.cache_clear()
    assert versions == {}
    assert "selection by its function (the plugin needs TensorRT with tensorrt.plugin, 10.7 or later" in note


def test_the_parsers_graph_has_the_plugins_node_and_the_same_weights(tiny: Path, tmp_path: Path) -> None:
    source = tiny / "onnx" / "vision_select.onnx"
    (tmp_path / "folder").mkdir()
    changed, original = onnx.load(with_plugin(source, tmp_path / "folder")), onnx.load(source)
    (node,) = (node for node in changed.graph.node if node.op_type == "ResidualSelect")
    assert len(node.output) == 2
    assert "ResidualSelect" not in {function.name for function in changed.functions}
    assert [one.raw_data for one in changed.graph.initializer] == [
        one.raw_data for one in original.graph.initializer
    ]
    assert len(original.functions) == len(changed.functions) + 1, "the bundle's own file stays as it is"


def test_build_hands_the_parser_that_graph_and_remembers(
    tiny: Path, registered: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs: dict[str, list[int]] = {}

    def engine(bundle: Any, graph: str, path: Path, *rest: Any) -> Any:
        nodes = onnx.load(path).graph.node
        outputs[graph] = [len(node.output) for node in nodes if node.op_type == "ResidualSelect"]
        return memoryview(b"engine"), "Layer 0"

    monkeypatch.setattr(engines, "_engine_bytes", engine)
    monkeypatch.setattr(engines, "known_targets", lambda flavour: ["sm_86"])
    monkeypatch.setattr(engines, "_versions", lambda flavour: {flavour: "11.4"})
    lines: list[str] = []
    for _ in range(2):
        build(tiny, "tensorrt", ["sm_86"], report=lines.append)
    assert outputs["vision_select"] == outputs["token_select"] == [2]
    assert outputs["embed_tokens"] == []
    made = read_bundle(tiny).manifest.engines["tensorrt-sm_86"].graphs
    assert made["token_select"].versions.keys() == {"tensorrt", "triton"}
    assert made["embed_tokens"].versions.keys() == {"tensorrt"}
    assert sum("selection by its kernel" in line for line in lines) == 4
    again = lines[len(lines) // 2 :]
    assert all("reused" in line for line in again)
    assert not list((tiny / "engines").glob(".new-*"))
