"""Both forms of the selection and both bodies are one function, and the picks of float64, where it is hardest."""

import functools

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.inliner import inline_local_functions

from resprune.exporter.verify.reference import picks_within_rounding, residual_select
from resprune.graphs import choose_form, token_select_model
from resprune.graphs.functions import GRAM_BYTES, SEGMENT
from resprune.method import FORMS, Selection


@functools.cache
def selector(k, form, body="loop"):
    """A session whose gain is 1, one thread: the sums of a product must not depend on how many there are."""
    model = token_select_model(Selection(k=k, alpha=0.0, form=form, body=body))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def picks(k, form, visual, token_mask=None, body="loop"):
    """Pick order [B, k] for visual [B, N, D]."""
    B, N, D = visual.shape
    feed = {
        "image_features": visual.astype(np.float32),
        "text_embeds": np.zeros((B, 1, D), np.float32),
        "text_mask": np.zeros((B, 1), bool),
        "token_mask": np.ones((B, N), bool) if token_mask is None else token_mask,
    }
    return selector(k, form, body).run(["pick_order"], feed)[0]


@pytest.mark.parametrize("form", FORMS)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 90),
    d=st.integers(1, 96),
    rank=st.integers(1, 96),
    power=st.integers(-12, 12),
)
@settings(max_examples=40, deadline=None)
def test_picks_are_the_reference_s(form, seed, n, d, rank, power):
    """For more and fewer tokens than k, one buffer of columns and two, any rank, any norm."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((2, n, min(rank, d))) @ rng.standard_normal((min(rank, d), d)) * 2.0**power
    visual = torch.from_numpy(rows.astype(np.float32))
    mask = torch.from_numpy(rng.random((2, n)) > 0.2)
    order = torch.from_numpy(picks(70, form, visual.numpy(), mask.numpy()))
    gain = torch.ones(2, n) * mask
    wanted = residual_select(visual, gain, 70, mask)
    assert ((order == wanted) | picks_within_rounding(visual, gain, order, mask)).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("dim", [64, 1024, 4096])
def test_a_copy_of_a_kept_token_has_no_energy_left(form, norm, dim):
    """Each direction is picked once, though 4,096 products added in two ways differ by more than EXHAUSTED."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        directions = rng.standard_normal((40, dim)) * norm
        which = np.concatenate([np.arange(40), rng.integers(0, 40, 210)])
        rng.shuffle(which)
        visual = directions[which][None].astype(np.float32)
        order = picks(60, form, visual)
        assert sorted(which[order[0, :40]]) == list(range(40))
        first = [int(np.flatnonzero(which == token)[0]) for token in which[order[0, :40]]]
        assert order[0, :40].tolist() == first, "the lowest index of equal tokens"
        # What is left is filled by the scores at the start, equal tokens by index.
        rest = [int(token) for token in order[0, 40:]]
        assert len(set(order[0].tolist())) == 60
        energy = (visual[0].astype(np.float64) ** 2).sum(axis=1)[rest]
        assert (energy[1:] <= energy[:-1] * (1 + 2e-5)).all()


@pytest.mark.parametrize("form", FORMS)
def test_steps_in_several_buffers_are_the_steps_in_one(form):
    """Across two borders between buffers; and nested: fewer steps, in Loops or in a row, pick the same."""
    k = 2 * SEGMENT + 9
    visual = np.random.default_rng(3).standard_normal((2, 200, 256)).astype(np.float32)
    order = picks(k, form, visual)
    gain = torch.ones(2, 200)
    np.testing.assert_array_equal(order, residual_select(torch.from_numpy(visual), gain, k).numpy())
    np.testing.assert_array_equal(order[:, :SEGMENT], picks(SEGMENT, form, visual))
    shorter = SEGMENT + 3
    np.testing.assert_array_equal(order[:, :shorter], picks(shorter, form, visual, body="unrolled"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT + 9])
def test_fewer_tokens_than_k_are_all_kept(form, count):
    """Loops with no step to do are among these."""
    k = 2 * SEGMENT + 9
    visual = np.random.default_rng(count).standard_normal((2, count, 256)).astype(np.float32)
    order = picks(k, form, visual)
    assert (np.sort(order[:, :count]) == np.arange(count)).all()
    assert (order[:, count:] == -1).all()


@pytest.mark.parametrize(("form", "squares"), [("quadratic", True), ("linear", False)])
def test_the_linear_form_has_no_matrix_of_all_pairs(form, squares):
    model = inline_local_functions(token_select_model(Selection(k=4, alpha=0.0, form=form, body="unrolled")))
    sizes = {"batch_size": 1, "num_tokens": 50, "hidden_size": 8, "text_tokens": 3}
    for value in model.graph.input:
        for axis in value.type.tensor_type.shape.dim:
            axis.dim_value = sizes[axis.dim_param]
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    shapes = [[axis.dim_value for axis in v.type.tensor_type.shape.dim] for v in inferred.graph.value_info]
    assert any(shape.count(50) == 1 for shape in shapes)
    assert any(shape.count(50) == 2 for shape in shapes) == squares


@pytest.mark.parametrize(
    ("k", "num_tokens", "hidden_size", "form"),
    [
        (64, 576, 4096, "linear"),
        (192, 576, 4096, "quadratic"),
        (160, 2928, 4096, "linear"),
        (320, 2928, 4096, "quadratic"),
        (1802, 16384, 2048, "linear"),
    ],
)
def test_the_faster_form_is_chosen_and_no_huge_matrix(k, num_tokens, hidden_size, form):
    assert choose_form(k, num_tokens, hidden_size) == form
    if 4 * num_tokens**2 > GRAM_BYTES:
        assert form == "linear"
