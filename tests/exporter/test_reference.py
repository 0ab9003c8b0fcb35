"""The PyTorch reference against the float64 cases, and the properties that any input must satisfy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resprune.exporter.verify.reference import (
    counts_within_rounding,
    keep,
    kept_counts,
    picks_within_rounding,
    residual_select,
    text_gain,
)
from tests.vectors import CASES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_vectors(case):
    visual, text, text_mask, token_mask = map(torch.from_numpy, case.inputs())
    gain = text_gain(visual, text, text_mask, token_mask, alpha=case.alpha, scale=case.scale)
    picks = residual_select(visual, gain, case.k, token_mask)
    valid = token_mask[0].numpy()
    np.testing.assert_allclose(gain[0].numpy()[valid], case.arrays["gain"][valid], atol=1e-5)
    np.testing.assert_array_equal(picks[0].numpy(), case.arrays["pick_order"])


def test_batch_equals_each_alone():
    cases = [case for case in CASES if case.name in ("plain", "masked_tokens", "text_mask")]
    N, D, M = (
        max(case.arrays[key].shape[axis] for case in cases)
        for key, axis in (("visual", 0), ("visual", 1), ("text", 0))
    )
    visual, text = torch.zeros(len(cases), N, D), torch.zeros(len(cases), M, D)
    text_mask = torch.zeros(len(cases), M, dtype=torch.bool)
    token_mask = torch.zeros(len(cases), N, dtype=torch.bool)
    for row, case in enumerate(cases):
        v, t, tm, vm = (torch.from_numpy(array[0]) for array in case.inputs())
        visual[row, : v.shape[0], : v.shape[1]] = v
        text[row, : t.shape[0], : t.shape[1]] = t
        text_mask[row, : tm.shape[0]] = tm
        token_mask[row, : vm.shape[0]] = vm
    gain = text_gain(visual, text, text_mask, token_mask, alpha=1.0, scale="minmax")
    picks = residual_select(visual, gain, 8, token_mask)
    for row, case in enumerate(cases):
        assert case.alpha == 1.0
        assert case.scale == "minmax"
        np.testing.assert_array_equal(picks[row].numpy(), case.arrays["pick_order"][:8])


def _features(seed, n, d, dtype=torch.float32):
    """Rows whose residual energies are far enough apart that no two scores tie at any step that is tested."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(1, n, d, generator=generator, dtype=torch.float64)
    return (rows * torch.linspace(0.5, 2.0, n, dtype=torch.float64)[None, :, None]).to(dtype)


SIZES = {"seed": st.integers(0, 2**31), "n": st.integers(2, 40), "d": st.integers(2, 48)}


@given(**SIZES, k=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_nested(seed, n, d, k):
    visual = _features(seed, n, d)
    gain = torch.rand(1, n, generator=torch.Generator().manual_seed(seed))
    longest = residual_select(visual, gain, n)
    assert torch.equal(residual_select(visual, gain, min(k, n)), longest[:, : min(k, n)])


@given(**SIZES)
@settings(max_examples=60, deadline=None)
def test_permutation_permutes_the_picks(seed, n, d):
    visual = _features(seed, n, d)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    gain = torch.ones(1, n)
    k = min(n, d) // 2 + 1  # stay clear of exhaustion, where rounding alone is left
    picks = residual_select(visual, gain, k)
    permuted = residual_select(visual[:, order], gain, k)
    assert torch.equal(order[permuted[0]], picks[0])


@given(**SIZES, power=st.integers(-8, 8))
@settings(max_examples=60, deadline=None)
def test_scaling_all_tokens_changes_nothing(seed, n, d, power):
    visual = _features(seed, n, d)
    text = _features(seed + 1, 3, d)
    picks = []
    for features in (visual, visual * 2.0**power):
        gain = text_gain(features, text, alpha=1.0, scale="minmax")
        picks.append(residual_select(features, gain, n))
    assert torch.equal(*picks)


@given(seed=st.integers(0, 2**31), n=st.integers(2, 20), copies=st.integers(2, 3))
@settings(max_examples=60, deadline=None)
def test_duplicates_are_never_both_picked_before_exhaustion(seed, n, copies):
    visual = _features(seed, n, 64).repeat(1, copies, 1)  # n ≤ 20 < 64: n picks exhaust the span, not fewer
    picks = residual_select(visual, torch.ones(1, n * copies), n)[0]
    assert sorted((picks % n).tolist()) == list(range(n))
    assert (picks < n).all(), "of equals the lowest index is picked"


@given(**SIZES, extra=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_k_at_least_n_keeps_every_token_once(seed, n, d, extra):
    picks = residual_select(_features(seed, n, d), torch.ones(1, n), n + extra)[0].tolist()
    assert sorted(picks[:n]) == list(range(n))
    assert picks[n:] == [-1] * extra


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_is_computed_in_float32(dtype):
    visual, text = _features(3, 30, 24, dtype), _features(4, 2, 24, dtype)
    gain = text_gain(visual, text, alpha=1.0, scale="minmax")
    assert gain.dtype == torch.float32
    expected = residual_select(
        visual.float(), text_gain(visual.float(), text.float(), alpha=1.0, scale="minmax"), 10
    )
    assert torch.equal(residual_select(visual, gain, 10), expected)


def test_picks_within_rounding_takes_the_references_and_no_other():
    """Every pick of every case is the best; a clear loser, a token twice, and padding are not."""
    for case in CASES:
        visual, text, text_mask, token_mask = map(torch.from_numpy, case.inputs())
        gain = text_gain(visual, text, text_mask, token_mask, alpha=case.alpha, scale=case.scale)
        picks = torch.from_numpy(case.arrays["pick_order"])[None]
        assert picks_within_rounding(visual, gain, picks, token_mask).all(), case.name
    visual, gain = torch.tensor([[[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]]]), torch.ones(1, 3)
    mask = torch.tensor([[True, True, False]])
    for wrong, expected in (([1, 0], [False, True]), ([0, 0], [True, False]), ([0, -1], [True, False])):
        assert picks_within_rounding(visual, gain, torch.tensor([wrong]), mask)[0].tolist() == expected
    assert picks_within_rounding(visual, gain, torch.tensor([[0, 2]]), mask)[0].tolist() == [True, False]
    nearly = torch.tensor([[[1.0, 0.0], [0.0, 1e-4], [0.0, 1.1e-4]]])
    assert picks_within_rounding(nearly, gain, torch.tensor([[0, 1, 2]]))[0].all(), "float32 cannot tell"


def test_picks_within_rounding_knows_the_order_of_fills():
    """Beyond the span: the order by score before any pick, entered a few picks late, and no other order."""
    visual = _features(1, 60, 12)
    gain = torch.rand(1, 60, generator=torch.Generator().manual_seed(1))
    picks = residual_select(visual, gain, 50)
    assert picks_within_rounding(visual, gain, picks).all()
    late = torch.cat([picks[:, :12], picks[:, 40:43], picks[:, 12:40], picks[:, 43:]], dim=1)
    assert picks_within_rounding(visual, gain, late).all(), "three picks by noise"
    backwards = torch.cat([picks[:, :12], picks[:, 12:].flip(1)], dim=1)
    assert not picks_within_rounding(visual, gain, backwards)[0, 30:-1].any()


def test_keep_is_ascending_and_marks_what_is_missing():
    visual = _features(0, 4, 3)
    rows, indices = keep(visual, torch.tensor([[2, 0, -1]]))
    assert indices.tolist() == [[0, 2, -1]]
    assert torch.equal(rows[0, :2], visual[0, [0, 2]])
    assert not rows[0, 2].any()


def test_counts_by_hand():
    """Whatever its length, a row goes with the direction that is nearest; a kept one always with itself."""
    rows = [[1, 0], [9, 1], [0, 2], [1, 5], [0, 2], [-3, -1], [0, 0], [7, 7]]
    visual = torch.tensor([rows], dtype=torch.float32)
    assert kept_counts(visual, torch.tensor([[0, 2]])).tolist() == [[4, 4]], "0 1 6 7, of which two are ties"
    assert kept_counts(visual, torch.tensor([[2, 4, 5]])).tolist() == [[6, 1, 1]], "2 and 4 are duplicates"
    assert kept_counts(visual, torch.tensor([[3, 6]])).tolist() == [[6, 2]], (
        "nothing is nearer to 5 than to 6"
    )
    assert kept_counts(visual, torch.tensor([[2, -1, 5]])).tolist() == [[7, 0, 1]]
    mask = torch.ones(1, 8, dtype=torch.bool)
    mask[0, 4:] = False
    assert kept_counts(visual, torch.tensor([[0, 2, -1]]), mask).tolist() == [[2, 2, 0]]


@given(**SIZES, k=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_counts_add_up_and_are_within_rounding(seed, n, d, k):
    visual = _features(seed, n, d)
    kept = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: min(k, n)].sort().values[None]
    counts = kept_counts(visual, kept)
    assert counts.sum() == n
    assert (counts >= 1).all()
    assert counts_within_rounding(visual, kept, counts).all()
    assert not counts_within_rounding(visual, kept, counts + 1).any()
    assert torch.equal(kept_counts(visual, torch.arange(n)[None]), torch.ones(1, n, dtype=torch.int64))


def test_counts_within_rounding_takes_either_side_of_a_close_call_and_no_more():
    """Of two dropped tokens one is clearly the first's, the other as near to both as float32 can tell."""
    visual = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [1.0, 1.0 + 1.4e-5]]])
    kept = torch.tensor([[0, 1]])
    for counts in ([3, 1], [2, 2]):
        assert counts_within_rounding(visual, kept, torch.tensor([counts]))[0].all()
    for counts in ([1, 3], [4, 0], [2, 1]):
        assert not counts_within_rounding(visual, kept, torch.tensor([counts]))[0].all()
    clear = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [1.0, 1.1]]])
    assert counts_within_rounding(clear, kept, torch.tensor([[2, 2]]))[0].all()
    assert not counts_within_rounding(clear, kept, torch.tensor([[3, 1]]))[0].any()
    mask = torch.tensor([[True, True, True, False]])
    assert counts_within_rounding(clear, kept, torch.tensor([[2, 1]]), mask)[0].all()


def test_arguments_out_of_range_are_refused():
    visual = torch.ones(1, 2, 2)
    with pytest.raises(ValueError, match="scale"):
        text_gain(visual, visual, scale="softmax")
    with pytest.raises(ValueError, match="alpha"):
        text_gain(visual, visual, alpha=-1.0)
    with pytest.raises(ValueError, match="k should"):
        residual_select(visual, torch.ones(1, 2), 0)
