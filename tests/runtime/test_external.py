"""Where a graph's weights lie is read from the file as the onnx package reads it, and held against the manifest."""

from pathlib import Path

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from resprune.runtime.bundle.external import MESSAGES, require_listed
from resprune.runtime.errors import ResPruneError
from tests.runtime.bundles import one_sentence


def tensor(location: str, name: str = "w") -> onnx.TensorProto:
    made = TensorProto(name=name, data_type=1, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "8")):
        made.external_data.add(key=key, value=value)
    return made


def model(
    *, weights: str | None = None, constant: str | None = None, inner: str | None = None
) -> onnx.ModelProto:
    """A graph with tensors in its initializers, in a node, and in a graph inside of a node."""
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    if constant is not None:
        nodes.append(helper.make_node("Constant", [], ["c"], value=tensor(constant)))
    if inner is not None:
        body = helper.make_graph(
            [helper.make_node("Constant", [], ["d"], value=tensor(inner))], "body", [], []
        )
        nodes.append(helper.make_node("Loop", [], ["l"], body=body))
    value = helper.make_tensor_value_info("x", 1, [2])
    graph = helper.make_graph(nodes, "g", [value], [value], [] if weights is None else [tensor(weights)])
    return helper.make_model(graph)


def refused(root: Path, content: bytes, *listed: str) -> str:
    (root / "onnx").mkdir(exist_ok=True)
    (root / "onnx" / "g.onnx").write_bytes(content)
    with pytest.raises(ResPruneError) as error:
        require_listed(root, "onnx/g.onnx", listed)
    return one_sentence(error.value).removeprefix(str(root))


def test_every_message_that_holds_tensors_is_walked() -> None:
    """Against the descriptors of the onnx package: the same fields lead to the same messages."""
    seen, waiting = {}, [onnx.ModelProto.DESCRIPTOR]
    while waiting:
        message = waiting.pop()
        if message.name not in seen:
            inner = {field.number: field.message_type for field in message.fields if field.message_type}
            seen[message.name] = inner
            waiting += inner.values()
    leads = {"StringStringEntryProto"}
    for _ in seen:  # what leads to tensors; metadata have the same entries, and name no file
        leads |= {
            name
            for name, inner in seen.items()
            if any(kind.name in leads - {"StringStringEntryProto"} for kind in inner.values())
        } | {"TensorProto"}
    expected = {
        name: {
            number: kind.name
            for number, kind in inner.items()
            if kind.name in leads and (kind.name != "StringStringEntryProto" or number == 13)
        }
        for name, inner in seen.items()
        if name in leads - {"StringStringEntryProto"}
    }
    assert expected == MESSAGES


def test_weights_in_listed_files_pass(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    graph = model(weights="g.onnx_data", constant="./g.onnx_data", inner="../other")
    (tmp_path / "onnx" / "g.onnx").write_bytes(graph.SerializeToString())
    require_listed(tmp_path, "onnx/g.onnx", ["onnx/g.onnx_data", "other"])


@pytest.mark.parametrize("place", ["weights", "constant", "inner"])
@pytest.mark.parametrize(
    "location",
    ["/etc/passwd", "../../secret", "other", "", "a\\b", "*/_ORT_MEM_ADDR_/*", "\x1b[2J", "x" * 5000],
)
def test_weights_elsewhere_are_refused(tmp_path: Path, place: str, location: str) -> None:
    content = model(**{place: location}).SerializeToString()
    assert "which the bundle does not list" in refused(tmp_path, content, "onnx/g.onnx", "onnx/g.onnx_data")


def test_entries_in_any_order_and_twice_are_read(tmp_path: Path) -> None:
    def entry(*fields: bytes) -> bytes:
        return b"".join(fields)

    key, fine, bad = b"\x0a\x08location", b"\x12\x01d", b"\x12\x01e"
    long = b"\x0a\x88\x00location"  # the same number in more bytes
    for external in (entry(bad, key), entry(key, fine, bad), entry(key, bad, fine), entry(long, bad)):
        made = b"\x6a" + bytes([len(external)]) + external
        graph = b"\x2a" + bytes([len(made)]) + made
        content = b"\x3a" + bytes([len(graph)]) + graph
        assert "onnx_data" not in refused(tmp_path, content, "onnx/d")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"graph",
        b"\xff" * 40,
        b"\x3a\x05ab",
        b"\x3b\x3c",
        b"\x3a\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01",
    ],
    ids=ascii,
)
def test_what_is_no_protobuf_is_refused(tmp_path: Path, content: bytes) -> None:
    assert "is not an ONNX graph" in refused(tmp_path, content, "onnx/g.onnx")


def test_graphs_nested_without_end_are_refused(tmp_path: Path) -> None:
    content = b""
    for _ in range(5000):  # a graph in an attribute in a node
        for tag in (b"\x32", b"\x2a", b"\x0a"):
            size = len(content)
            content = tag + bytes([size & 0x7F | 0x80, size >> 7 & 0x7F | 0x80, size >> 14]) + content
    size = len(content)
    content = b"\x3a" + bytes([size & 0x7F | 0x80, size >> 7 & 0x7F | 0x80, size >> 14]) + content
    assert "is not an ONNX graph" in refused(tmp_path, content)


@settings(max_examples=200)
@given(data=st.data())
def test_any_change_of_bytes_is_read_or_refused(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.getbasetemp() / "changed"
    (root / "onnx").mkdir(parents=True, exist_ok=True)
    content = bytearray(model(weights="d", constant="d", inner="d").SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (root / "onnx" / "g.onnx").write_bytes(content)
    try:
        require_listed(root, "onnx/g.onnx", ["onnx/d"])
    except ResPruneError as error:
        one_sentence(error)
