import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resprune.method import Selection, share_of
from resprune.runtime.bundle.manifest import (
    MANIFEST_NAME,
    Early,
    FileSpec,
    GraphSpec,
    Manifest,
    TensorSpec,
)
from resprune.runtime.errors import ResPruneError
from tests.runtime import bundles
from tests.runtime.bundles import one_sentence

MANIFEST = dataclasses.replace(bundles.MANIFEST, early=Early(3, 72, 144, 0.5))
GRAPH = MANIFEST.graphs["vision_select"]
ENGINES = ("engines", "tensorrt-rtx-sm_86")
ENGINE = (*ENGINES, "graphs", "vision_select")


def edited(*path: str | int, value: Any) -> str:
    """Text of the manifest with the value at `path` replaced."""
    top = json.loads(MANIFEST.to_json())
    place = top
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return json.dumps(top)


def rejected(text: str | bytes) -> str:
    with pytest.raises(ResPruneError) as caught:
        Manifest.from_json(text)
    return one_sentence(caught.value)


names = st.text(st.characters(categories=("L", "N")), min_size=1, max_size=8)
tensors = st.builds(
    TensorSpec,
    names,
    st.sampled_from(["float32", "float16", "int64", "bool"]),
    st.lists(st.integers(0, 1 << 40) | names, max_size=4).map(tuple),
)


@settings(max_examples=50)
@given(
    tensors=st.lists(tensors, max_size=4, unique_by=lambda tensor: tensor.name).map(tuple),
    alpha=st.floats(0, 1e6),
    files=st.dictionaries(
        names, st.builds(FileSpec, st.integers(0, 1 << 50), st.just("0f" * 32)), min_size=1
    ),
    text=st.text(st.characters(exclude_categories=("Cs",))),
    parity=st.dictionaries(names, st.floats(allow_nan=False, allow_infinity=False) | st.none() | names),
)
def test_any_manifest_survives_the_round_trip(
    tensors: tuple[TensorSpec, ...],
    alpha: float,
    files: dict[str, FileSpec],
    text: str,
    parity: dict[str, Any],
) -> None:
    manifest = dataclasses.replace(
        MANIFEST,
        selection=dataclasses.replace(MANIFEST.selection, alpha=alpha),
        graphs={"g": GraphSpec("g.onnx", "fp16", tensors, tensors)},
        engines={},
        files=files | {"g.onnx": FileSpec(1, "0f" * 32)},
        model=text,
        command=text,
        parity=parity,
    )
    assert Manifest.from_json(manifest.to_json()) == manifest


def every_path(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(deeper for step, inner in steps for deeper in every_path(inner, (*path, step)))]


CHECKED = [path for path in every_path(json.loads(MANIFEST.to_json())) if path and path[0] != "parity"]


FREE_TEXT = {"family", "model", "revision", "command", "created", "name", "onnx", "tensorrt-rtx"}


OPTIONAL = {"revision", "optimize", "attention", "early", "engines"}


def legal(path: tuple[str | int, ...], value: Any) -> bool:
    in_shape = len(path) > 1 and path[-2] == "shape"
    return (value == 1.5 and path[-1] == "alpha") or (value == "\n" and (path[-1] in FREE_TEXT or in_shape))


@pytest.mark.parametrize("path", CHECKED, ids=lambda path: ".".join(map(str, path)))
@pytest.mark.parametrize(
    "value", [True, 1.5, -1, [[]], {"": None}, 10**400, "\n"], ids=lambda v: ascii(v)[:9]
)
def test_a_value_of_the_wrong_kind_is_named(path: tuple[str | int, ...], value: Any) -> None:
    text = edited(*path, value=value)
    if legal(path, value):
        # An engine's profiles name the axes as the graph did.
        Manifest.from_json(json.dumps({**json.loads(text), "engines": {}}))
    else:
        message = rejected(text)
        assert any(str(step) in message for step in path[-2:]) or "upgrade" in message


@pytest.mark.parametrize(
    "key", [field.name for field in dataclasses.fields(Manifest) if field.name not in OPTIONAL]
)
def test_a_missing_key_is_named(key: str) -> None:
    top = json.loads(MANIFEST.to_json())
    del top[key]
    assert f"has no {key}" in rejected(json.dumps(top))


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("format_version",), 4, "upgrade resprune"),
        (("format_version",), 0, "format_version"),
        (("selection", "k"), 0, "selection.k"),
        (("selection", "k"), 145, "at most num_tokens = 144"),
        (("selection", "max_tokens"), 15, "at most max_tokens = 15"),
        (("selection", "max_tokens"), 0, "selection.max_tokens"),
        (("selection", "share"), 0, "selection.share"),
        (("selection", "share"), 1.01, "selection.share"),
        (("selection", "alpha"), -0.5, "selection.alpha"),
        (("attention",), "flash", "attention should be one of plain, proportional"),
        (("early", "tokens"), 144, "early.tokens"),
        (("early", "layer"), 0, "early.layer"),
        (("early", "share"), 1.01, "early.share"),
        (("optimize",), "trt", "optimize should be one of ort"),
        (("selection", "scale"), "softmax", "minmax, clamp, shifted"),
        (("selection", "body"), "scan", "loop, unrolled"),
        (("selection", "form"), "cubic", "quadratic, linear"),
        (("positions",), "shuffled", "contiguous, original"),
        (("context_length",), 0, "context_length"),
        (("image_token_id",), 1 << 63, "image_token_id"),
        (("graphs", "vision_select", "file"), "onnx/other.onnx", "one of the .onnx files in files"),
        (("graphs", "vision_select", "file"), "config.json", "one of the .onnx files in files"),
        (("image_token_id",), 1 << 32, "from 0 to 2147483647"),
        (("selection", "k"), 1 << 62, "selection.k should be a whole number from 1 to 1048576"),
        (("selection", "num_tokens"), 1 << 62, "selection.num_tokens"),
        (("selection", "max_tokens"), 1 << 21, "selection.max_tokens"),
        (("parity",), json.loads("[" * 600 + "]" * 600), "nested too deeply"),
        (("parity",), {"a": json.loads('{"a":' * 600 + "1" + "}" * 600)}, "nested too deeply"),
        (
            ("graphs", "vision_select", "inputs", 0, "dtype"),
            "complex64",
            "float32, float16, bfloat16, int64, bool",
        ),
        ((*ENGINES, "flavour"), "tensorrt-llm", "tensorrt, tensorrt-rtx"),
        ((*ENGINES, "target"), "ampere", "like sm_86"),
        ((*ENGINE, "file"), "engines/other.engine", "names in files"),
        ((*ENGINE, "sources"), {"onnx/vision_select.onnx": "0f"}, "hexadecimal"),
        ((*ENGINE, "profiles"), [{"batch_size": [4, 1, 1]}], "three ascending sizes"),
        ((*ENGINE, "profiles"), [{"batch_size": [1, 4]}], "three ascending sizes"),
        ((*ENGINE, "profiles"), [{"batch": [1, 1, 4]}], "sizes of the axes"),
        ((*ENGINES, "graphs", "segmenter"), {}, "has no engines.tensorrt-rtx-sm_86.graphs.segmenter.sources"),
        (("graphs", "vision_select", "inputs", 0, "shape"), [1] * 9, "at most 8 axes"),
        (("graphs", "vision_select", "inputs", 0, "shape"), [-3], "-3"),
        (("files", "config.json", "sha256"), "F" * 64, "hexadecimal"),
        (("files", "config.json", "sha256"), "0f", "hexadecimal"),
    ],
)
def test_a_value_out_of_range_is_named(path: tuple[str | int, ...], value: Any, says: str) -> None:
    assert says in rejected(edited(*path, value=value))


@pytest.mark.parametrize(
    "name",
    [
        *("../x", "a/../../x", "/etc/passwd", "", ".", "a//b", "./a", "a/", "C:/x", "a\\..\\x"),
        *("a\0b", "a\nb", "\ud800", "\u202etxt", MANIFEST_NAME, "x" * 2000, "a/" + "x" * 256),
    ],
)
def test_a_file_name_that_could_leave_the_bundle_is_refused(name: str) -> None:
    assert "stays inside the bundle" in rejected(
        edited(
            "files", value={name: {"size": 1, "sha256": "0" * 64}, **json.loads(MANIFEST.to_json())["files"]}
        )
    )


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        b"{",
        b"[]",
        b"null",
        b'"resprune"',
        b"{}",
        b'{"format_version": ' + b"9" * 5000 + b"}",
        b'{"parity": ' + b"[" * 200_000,
        b"\xef\xbb\xbf{}",
        json.dumps({"x" * 10_000: 1}).encode() * 2,
    ],
    ids=lambda text: ascii(text)[:24],
)
def test_text_that_is_no_manifest_is_refused(text: bytes) -> None:
    assert MANIFEST_NAME in rejected(text)


@pytest.mark.parametrize(
    ("instead", "says"),
    [
        ('"parity": {}, "parity": {}', "the key 'parity' stands twice"),
        ('"parity": {"x": NaN}', "'NaN' is no finite number"),
        ('"parity": {"x": -Infinity}', "'-Infinity' is no finite number"),
        ('"parity": {"x": 1e999}', "'1e999' is no finite number"),
    ],
)
def test_json_that_readers_disagree_on_is_refused(instead: str, says: str) -> None:
    text = edited("parity", value={})
    Manifest.from_json(text)
    assert says in rejected(text.replace('"parity": {}', instead))


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda s: st.lists(s) | st.dictionaries(st.text(), s),
    )
)
def test_any_json_is_refused_with_one_sentence(value: Any) -> None:
    rejected(json.dumps(value))


@given(st.data())
def test_a_manifest_with_one_byte_changed_is_read_or_refused(data: st.DataObject) -> None:
    text = bytearray(MANIFEST.to_json().encode())
    text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    try:
        Manifest.from_json(bytes(text))
    except ResPruneError as error:
        one_sentence(error)


@pytest.mark.parametrize(
    ("share", "num_tokens", "kept"),
    [
        (0.11, 100, 11),
        (0.11, 101, 12),
        (0.11, 1, 1),
        (0.07, 100, 7),
        (1.0, 1296, 1296),
        (0.333, 1296, 432),
        (1e-9, 576, 1),
    ],
)
def test_a_share_is_rounded_up_but_not_by_rounding_errors(share: float, num_tokens: int, kept: int) -> None:
    assert share_of(share, num_tokens) == kept


def test_planes_are_counted_where_images_come_out() -> None:
    """Of the encoder where there is one: the fused graph may have them too, and other graphs take them."""
    planes = tuple(TensorSpec(f"plane_features.{index}", "float32", (1, 4, 8)) for index in range(3))
    rows = TensorSpec("image_features", "float32", (1, 4, 8))
    vision = dataclasses.replace(GRAPH, outputs=(rows, *planes))
    selector = dataclasses.replace(GRAPH, inputs=(rows, *planes), outputs=(rows,))
    graphs = ({"vision_select": vision}, {"vision_encoder": vision, "token_select": selector}, {})
    assert [dataclasses.replace(MANIFEST, graphs=one).num_planes for one in graphs] == [3, 3, 0]
    assert MANIFEST.num_planes == 0


def test_a_manifest_that_names_no_form_has_the_quadratic_one() -> None:
    top = json.loads(MANIFEST.to_json())
    assert top["selection"].pop("form") == "linear"
    assert Manifest.from_json(json.dumps(top)).selection.form == "quadratic"


def test_a_manifest_that_names_no_attention_has_the_plain_one() -> None:
    top = json.loads(MANIFEST.to_json())
    assert top.pop("attention") == "plain"
    assert Manifest.from_json(json.dumps(top)).attention == "plain"


def test_the_keys_are_written_as_they_have_always_been() -> None:
    """Counts are not among the selection's: `attention` says them."""
    counting = dataclasses.replace(MANIFEST.selection, counts=True)
    written = json.loads(dataclasses.replace(MANIFEST, selection=counting).to_json())
    assert written["attention"] == "proportional"
    assert list(written)[-4:] == ["optimize", "attention", "early", "engines"]
    keys = ["k", "num_tokens", "alpha", "scale", "body", "max_tokens", "share", "form"]
    assert list(written["selection"]) == keys
    assert {*keys, "counts"} == {one.name for one in dataclasses.fields(Selection)}
    assert Manifest.from_json(json.dumps(written)).selection == counting


def test_a_budget_is_the_share_of_the_picture_and_at_most_k() -> None:
    by_number = Selection(k=16, max_tokens=144)
    by_share = dataclasses.replace(by_number, share=0.11)
    assert [by_number.budget(tokens) for tokens in (8, 100, 144)] == [16, 16, 16]
    assert [by_share.budget(tokens) for tokens in (8, 100, 144, 10_000)] == [1, 11, 16, 16]


def test_a_graph_that_names_no_weights_has_those_beside_it() -> None:
    """As in bundles from before two graphs could share them."""
    top = json.loads(MANIFEST.to_json())
    del top["graphs"]["vision_select"]["weights"]
    assert Manifest.from_json(json.dumps(top)).graphs["vision_select"].files() == ("onnx/vision_select.onnx",)
    data = "onnx/vision_select.onnx_data"
    top["files"][data] = top["files"]["config.json"]
    assert Manifest.from_json(json.dumps(top)).graphs["vision_select"].files() == (
        "onnx/vision_select.onnx",
        data,
    )


def test_weights_that_are_not_listed_are_refused() -> None:
    message = rejected(edited("graphs", "vision_select", "weights", value="onnx/other_data"))
    assert "graphs.vision_select.weights should be one of the names in files" in message
