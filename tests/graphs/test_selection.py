"""The ops' function bodies in ONNX Runtime, against the float64 cases and the PyTorch reference."""

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from resprune.exporter.verify.reference import (
    keep,
    kept_counts,
    protected_first,
    residual_select,
    text_gain,
)
from resprune.graphs import attach_selection, token_select_model
from resprune.method import BODIES, FORMS, Selection
from tests.graphs.selectors import run
from tests.vectors import CASES


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_vectors(case, form, body):
    model = token_select_model(replace(case.selection, body=body, form=form))
    out = run(model, *case.inputs())
    expected = case.arrays["pick_order"]
    np.testing.assert_array_equal(out["pick_order"][0], expected)
    ascending = np.sort(expected[expected >= 0])
    np.testing.assert_array_equal(out["kept_indices"][0, : len(ascending)], ascending)
    np.testing.assert_array_equal(out["kept_features"][0, : len(ascending)], case.arrays["visual"][ascending])
    assert (out["kept_indices"][0, len(ascending) :] == -1).all()
    assert not out["kept_features"][0, len(ascending) :].any()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gain_of_vectors(case):
    model = token_select_model(case.selection)
    node = next(node for node in model.graph.node if node.op_type == "TextGain")
    model.graph.output.append(helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None))
    out = run(model, *case.inputs())
    valid = case.arrays["token_mask"].astype(bool)
    np.testing.assert_allclose(out[node.output[0]][0][valid], case.arrays["gain"][valid], atol=1e-5)


@pytest.mark.parametrize("body", BODIES)
def test_the_file_is_a_valid_model_with_one_node_of_each_op(body):
    model = token_select_model(Selection(k=5, body=body))
    onnx.checker.check_model(model, full_check=True)
    ours = [node for node in model.graph.node if node.domain == "resprune"]
    assert [node.op_type for node in ours] == ["TextGain", "ResidualSelect"]
    for node in ours:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        assert attributes["plugin_namespace"] == b"resprune"
    assert sorted(f.name for f in model.functions) == ["ResidualSelect", "TextGain"]
    inner = {node.op_type for f in model.functions for node in f.node}
    assert ("Loop" in inner) == (body == "loop")
    assert all(node.domain == "" for f in model.functions for node in f.node)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_input_is_computed_in_float32(dtype):
    case = next(case for case in CASES if case.name == "llava_like")
    visual, text, text_mask, token_mask = map(torch.from_numpy, case.inputs())
    half = getattr(torch, dtype)
    visual, text = visual.to(half), text.to(half)
    expected = residual_select(
        visual, text_gain(visual, text, text_mask, token_mask, alpha=1.0, scale="minmax"), case.k, token_mask
    )
    model = token_select_model(Selection(k=case.k), dtype=dtype)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def value(tensor):
        if dtype == "float16":
            return ort.OrtValue.ortvalue_from_numpy(tensor.numpy())
        bits = tensor.contiguous().view(torch.int16).numpy()
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, TensorProto.BFLOAT16)

    feed = {
        "image_features": value(visual),
        "text_embeds": value(text),
        "text_mask": ort.OrtValue.ortvalue_from_numpy(text_mask.numpy()),
        "token_mask": ort.OrtValue.ortvalue_from_numpy(token_mask.numpy()),
    }
    (picks,) = session.run_with_ort_values(["pick_order"], feed)
    np.testing.assert_array_equal(picks.numpy(), expected.numpy())


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("form", FORMS)
def test_batch_with_masks_matches_the_reference(form, body):
    generator = torch.Generator().manual_seed(7)
    visual = torch.randn(4, 33, 20, generator=generator)
    text = torch.randn(4, 5, 20, generator=generator)
    text_mask = torch.rand(4, 5, generator=generator) > 0.4
    text_mask[2] = False  # a question without text in a batch with text
    token_mask = torch.rand(4, 33, generator=generator) > 0.3
    token_mask[3] = False
    token_mask[3, 4:7] = True  # fewer than k
    gain = text_gain(visual, text, text_mask, token_mask, alpha=2.0, scale="shifted")
    picks = residual_select(visual, gain, 12, token_mask)
    rows, indices = keep(visual, picks)
    out = run(
        token_select_model(Selection(k=12, alpha=2.0, scale="shifted", body=body, form=form)),
        *(tensor.numpy() for tensor in (visual, text, text_mask, token_mask)),
    )
    np.testing.assert_array_equal(out["pick_order"], picks.numpy())
    np.testing.assert_array_equal(out["kept_indices"], indices.numpy())
    np.testing.assert_array_equal(out["kept_features"], rows.numpy())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_counts_of_vectors(case):
    """Duplicates, zero rows, padding and fewer tokens than k among them; for every number of picks kept."""
    model = token_select_model(replace(case.selection, counts=True))
    visual, _, _, token_mask = map(torch.from_numpy, case.inputs())
    order = torch.from_numpy(case.arrays["pick_order"])[None]
    for num_kept in (1, case.k // 2 + 1, case.k):
        out = run(model, *case.inputs(), num_kept=np.array([num_kept]))
        np.testing.assert_array_equal(out["pick_order"], order)
        _, indices = keep(visual, order[:, :num_kept])
        expected = kept_counts(visual, indices, token_mask)[0]
        counts, kept = out["kept_counts"][0], np.isin(out["kept_indices"][0], indices)
        np.testing.assert_array_equal(counts[kept & (out["kept_indices"][0] >= 0)], expected[indices[0] >= 0])
        assert counts.sum() == token_mask.sum()
        assert not counts[~kept].any(), "later picks stand for nothing"


def test_counts_of_a_batch_that_keeps_different_numbers():
    generator = torch.Generator().manual_seed(8)
    visual = torch.randn(3, 40, 16, generator=generator)
    token_mask = torch.ones(3, 40, dtype=torch.bool)
    token_mask[1, 5:] = False  # fewer than k
    token_mask[2, ::3] = False
    text, text_mask = torch.randn(3, 2, 16, generator=generator), torch.ones(3, 2, dtype=torch.bool)
    inputs = [tensor.numpy() for tensor in (visual, text, text_mask, token_mask)]
    model = token_select_model(Selection(k=12, body="unrolled", counts=True))
    onnx.checker.check_model(model, full_check=True)
    assert [function.name for function in model.functions][-1] == "KeptCounts"
    num_kept = np.array([3, 12, 7])
    out = run(model, *inputs, num_kept=num_kept)
    plain = run(token_select_model(Selection(k=12, body="unrolled")), *inputs)
    for name, array in plain.items():
        np.testing.assert_array_equal(out[name], array)
    for row, count in enumerate(num_kept):
        (first,) = keep(visual[row][None], torch.from_numpy(plain["pick_order"][row, :count])[None])[1]
        expected = kept_counts(visual[row][None], first[None], token_mask[row][None])[0]
        there = np.isin(out["kept_indices"][row], first[first >= 0])
        np.testing.assert_array_equal(out["kept_counts"][row][there], expected[first >= 0])
        assert not out["kept_counts"][row][~there].any()


@pytest.mark.parametrize("counts", [False, True])
def test_planes_are_gathered_by_the_same_indices(counts):
    generator = torch.Generator().manual_seed(9)
    visual, *planes = torch.randn(3, 2, 30, 16, generator=generator)
    token_mask = torch.ones(2, 30, dtype=torch.bool)
    token_mask[1, 4:] = False  # fewer than k
    text, text_mask = torch.randn(2, 2, 16, generator=generator), torch.ones(2, 2, dtype=torch.bool)
    model = token_select_model(Selection(k=7, counts=counts), planes=2)
    onnx.checker.check_model(model, full_check=True)
    more = {f"plane_features.{index}": plane.numpy() for index, plane in enumerate(planes)}
    more |= {"num_kept": np.array([7, 7])} if counts else {}
    inputs = [tensor.numpy() for tensor in (visual, text, text_mask, token_mask)]
    out = run(model, *inputs, **more)
    for index, plane in enumerate(planes):
        rows, _ = keep(plane, torch.from_numpy(out["pick_order"]))
        np.testing.assert_array_equal(out[f"kept_planes.{index}"], rows.numpy())
    del more["plane_features.0"], more["plane_features.1"]
    plain = run(token_select_model(Selection(k=7, counts=counts)), *inputs, **more)
    for name, array in plain.items():
        np.testing.assert_array_equal(out[name], array)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("form", FORMS)
def test_protected_rows_are_kept_before_all_others(form, body):
    """None, some, as many as k, more than k, and some of an image that has fewer tokens than k."""
    generator = torch.Generator().manual_seed(10)
    visual = torch.randn(5, 30, 16, generator=generator)
    token_mask = torch.ones(5, 30, dtype=torch.bool)
    token_mask[4, 5:] = False
    protected = torch.zeros(5, 30, dtype=torch.bool)
    protected[1, [29, 3, 11]] = True
    protected[2, ::4] = True
    protected[3, ::2] = True
    protected[4, [2, 20]] = True  # the second is padding
    text, text_mask = torch.randn(5, 2, 16, generator=generator), torch.ones(5, 2, dtype=torch.bool)
    candidates = token_mask & ~protected
    gain = text_gain(visual, text, text_mask, candidates)
    greedy = residual_select(visual, gain, 8, candidates)
    expected = protected_first(protected & token_mask, greedy)
    assert expected[1, :3].tolist() == [3, 11, 29]
    assert expected[2].tolist() == list(range(0, 30, 4))
    assert expected[3].tolist() == list(range(0, 16, 2))
    assert sorted(expected[4].tolist()) == [-1, -1, -1, 0, 1, 2, 3, 4]
    model = token_select_model(Selection(k=8, body=body, form=form), protected=True)
    onnx.checker.check_model(model, full_check=True)
    inputs = [tensor.numpy() for tensor in (visual, text, text_mask, token_mask)]
    out = run(model, *inputs, protected_mask=protected.numpy())
    np.testing.assert_array_equal(out["pick_order"], expected.numpy())
    rows, indices = keep(visual, expected)
    np.testing.assert_array_equal(out["kept_indices"], indices.numpy())
    np.testing.assert_array_equal(out["kept_features"], rows.numpy())
    none = run(model, *inputs, protected_mask=np.zeros_like(protected.numpy()))
    plain = run(token_select_model(Selection(k=8, body=body, form=form)), *inputs)
    for name, array in plain.items():
        np.testing.assert_array_equal(none[name], array)


def encoder(batch="batch_size", tokens=9, dim=4):
    """A stand-in for a vision encoder: one product, with the output that every encoder of a bundle has."""
    weight = np.random.default_rng(0).standard_normal((3, dim)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["pixel_values", "weight"], ["image_features"])],
        "vision_encoder",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, [batch, tokens, 3])],
        [helper.make_tensor_value_info("image_features", TensorProto.FLOAT, [batch, tokens, dim])],
        [onnx.numpy_helper.from_array(weight, "weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), weight


@pytest.mark.parametrize("counts", [False, True])
def test_attached_selection_equals_encoder_then_selector(counts):
    model, weight = encoder()
    fused = attach_selection(model, Selection(k=4, counts=counts))
    onnx.checker.check_model(fused, full_check=True)
    inputs, outputs = ["text_embeds", "text_mask"], ["image_features", "kept_indices", "pick_order"]
    assert [i.name for i in fused.graph.input] == ["pixel_values", *inputs, *["num_kept"] * counts]
    assert [o.name for o in fused.graph.output] == [*outputs, *["kept_counts"] * counts]
    rng = np.random.default_rng(1)
    pixels = rng.standard_normal((2, 9, 3)).astype(np.float32)
    text, text_mask = rng.standard_normal((2, 2, 4)).astype(np.float32), np.ones((2, 2), bool)
    session = ort.InferenceSession(fused.SerializeToString(), providers=["CPUExecutionProvider"])
    more = {"num_kept": np.array([2, 4])} if counts else {}
    rows, indices, picks, *counted = session.run(
        None, {"pixel_values": pixels, "text_embeds": text, "text_mask": text_mask, **more}
    )
    apart = run(
        token_select_model(Selection(k=4, counts=counts)),
        pixels @ weight,
        text,
        text_mask,
        np.ones((2, 9), bool),
        **more,
    )
    if counts:
        np.testing.assert_array_equal(counted[0], apart["kept_counts"])
    np.testing.assert_array_equal(picks, apart["pick_order"])
    np.testing.assert_array_equal(indices, apart["kept_indices"])
    np.testing.assert_allclose(rows, apart["kept_features"], atol=1e-6)


def test_tokens_that_the_encoder_names_padding_are_not_candidates():
    """Also where a picture has fewer tokens than k, and where the whole batch has."""
    plain, _ = encoder(tokens="num_tokens")
    plain.graph.input.append(
        helper.make_tensor_value_info("pack_indices", TensorProto.INT64, ["batch_size", "num_tokens"])
    )
    fused = attach_selection(plain, Selection(k=6), padding="pack_indices")
    onnx.checker.check_model(fused, full_check=True)
    rng = np.random.default_rng(2)
    text, text_mask = rng.standard_normal((2, 2, 4)).astype(np.float32), np.ones((2, 2), bool)
    selector = token_select_model(Selection(k=6))
    session = ort.InferenceSession(fused.SerializeToString(), providers=["CPUExecutionProvider"])
    for tokens, longest in ((9, 7), (5, 4), (1, 1)):
        pixels = rng.standard_normal((2, tokens, 3)).astype(np.float32)
        pack = np.tile(np.arange(tokens), (2, 1))
        pack[1, longest:] = -1
        feed = {"pixel_values": pixels, "pack_indices": pack, "text_embeds": text, "text_mask": text_mask}
        _, _, picks = session.run(None, feed)
        _, weight = encoder()
        apart = run(selector, pixels @ weight, text, text_mask, pack >= 0)
        np.testing.assert_array_equal(picks, apart["pick_order"])
        assert sorted(picks[1][picks[1] >= 0]) == sorted(set(picks[1][picks[1] >= 0]))
        assert (picks[1] >= 0).sum() == min(6, longest)
        assert picks[1].max() < longest


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="no input pack_indices"):
        attach_selection(encoder()[0], Selection(k=4), padding="pack_indices")
    with pytest.raises(ValueError, match="at most the encoder's 9"):
        attach_selection(encoder()[0], Selection(k=10))
    for wrong in ({"k": 0}, {"alpha": -1.0}, {"scale": "soft"}, {"body": "while"}, {"form": "cubic"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Selection(**{"k": 4, **wrong})
    with pytest.raises(ValueError, match="dtype"):
        token_select_model(Selection(k=4), dtype="int8")
