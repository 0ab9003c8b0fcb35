"""The kernel in Triton's interpreter against the float64 cases and the PyTorch reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resprune.exporter.verify.reference import residual_select, text_gain
from tests.graphs.kernels.interpreted import SMALL, alone, arguments, features, gains, step_by_step, together
from tests.vectors import CASES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_vectors(case):
    visual, text, text_mask, token_mask = map(torch.from_numpy, case.inputs())
    gain = text_gain(visual, text, text_mask, token_mask, alpha=case.alpha, scale=case.scale)
    # The interpreter pays for each operation, not for its size: few blocks, and the last of them is not full.
    picks = alone(visual, gain, case.k, token_mask, TILE=128, DEPTH=128, TOKENS=128)
    np.testing.assert_array_equal(picks[0].numpy(), case.arrays["pick_order"])


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("k1", "duplicates")], ids=lambda case: case.name
)
def test_vectors_by_many_programs(case):
    """Ties within and across blocks, and exhaustion, where no program sees all scores."""
    visual, text, text_mask, token_mask = map(torch.from_numpy, case.inputs())
    gain = text_gain(visual, text, text_mask, token_mask, alpha=case.alpha, scale=case.scale)
    picks = step_by_step(visual, gain, case.k, token_mask, programs=2, **SMALL)
    np.testing.assert_array_equal(picks[0].numpy(), case.arrays["pick_order"])


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 50),
    d=st.integers(24, 40),
    k=st.integers(1, 7),
    programs=st.integers(1, 4),
    masked=st.sampled_from([0.0, 0.3, 0.95]),
)
@settings(max_examples=12, deadline=None)
def test_random_inputs_on_grids_of_any_size(seed, n, d, k, programs, masked):
    """More programs than blocks, fewer, and as many; tokens, dimensions and earlier picks that fill no block."""
    visual, gain = features(seed, n, d), gains(seed, n)
    token_mask = torch.rand(1, n, generator=torch.Generator().manual_seed(seed + 1)) >= masked
    picks = step_by_step(visual, gain, k, token_mask, programs=programs, **SMALL)
    assert torch.equal(picks, residual_select(visual, gain, k, token_mask))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_is_computed_in_float32(dtype):
    visual, gain = features(3, 40, 24, dtype), gains(4, 40)
    assert torch.equal(alone(visual, gain, 10, **SMALL), residual_select(visual, gain, 10))


def test_batch_with_masks():
    visual, gain = features(5, 37, 24, batch=3), gains(6, 37, batch=3)
    token_mask = torch.rand(3, 37, generator=torch.Generator().manual_seed(7)) > 0.3
    token_mask[1] = False
    token_mask[1, 4:7] = True  # fewer than k
    token_mask[2] = False  # none at all
    picks = step_by_step(visual, gain, 6, token_mask, programs=2, **SMALL)
    assert torch.equal(picks, residual_select(visual, gain, 6, token_mask))
    assert picks[2].tolist() == [-1] * 6


@pytest.mark.parametrize("programs", [2, 4])
def test_programs_that_wait_for_each_other(programs):
    """On a scratch of garbage, then on what that launch left in it; with four programs, one has no block of tokens."""
    visual, gain = features(8, 40, 24), gains(9, 40)
    expected = residual_select(visual, gain, 4)
    values = arguments(visual, gain, 4)
    for _ in range(2):
        values[6].fill_(-7)
        assert torch.equal(together(values, 4, programs=programs, **SMALL), expected)


def test_pictures_do_not_wait_for_each_other():
    visual, gain = features(10, 20, 24, batch=2), gains(11, 20, batch=2)
    picks = together(arguments(visual, gain, 3), 3, programs=2, **SMALL)
    assert torch.equal(picks, residual_select(visual, gain, 3))


@pytest.mark.filterwarnings("ignore:All-NaN")  # NumPy's, in the interpreter's maximum
def test_features_that_are_no_numbers_are_not_picked():
    visual, gain = features(12, 20, 24), gains(13, 20)
    visual[0, 5] = torch.nan
    picks = alone(visual, gain, 3, **SMALL)
    assert torch.equal(picks, residual_select(torch.where(visual.isnan(), 0, visual), gain, 3))
    assert alone(torch.full_like(visual, torch.nan), gain, 3, **SMALL).tolist() == [[-1, -1, -1]]


def test_two_tf32_parts_come_close_to_float32():
    """What the kernel's docstring says of "tf32x3", emulated at its worst: TF32 alone is hundreds of times worse."""

    def tf32(x):  # 10 bits of mantissa, cut off as the tensor core cuts them
        return (x.view(np.int32) & np.int32(-(2**13))).view(np.float32)

    rng = np.random.default_rng(0)
    V = rng.standard_normal((24, 4096)).astype(np.float32)
    high = tf32(V)
    low = tf32(V - high)
    exact = V.astype(np.float64) @ V.astype(np.float64).T
    scale = np.sqrt(np.outer(exact.diagonal(), exact.diagonal()))

    def error(*products):
        """Products are exact, a slice of 32 is added downward, and the slices in float32."""
        total = np.zeros((24, 24), np.float32)
        for start in range(0, 4096, 32):
            part = sum(
                a[:, start : start + 32].astype(np.float64) @ b[:, start : start + 32].astype(np.float64).T
                for a, b in products
            )
            ulp = np.spacing(np.abs(part).astype(np.float32))
            total += (part - ulp * 12 * np.sign(part)).astype(np.float32)  # 12 additions, each an ulp short
        return np.abs(total - exact).max() / scale.max()

    split = error((low, high), (high, low), (high, high))
    assert split < 2e-6
    assert error((high, high)) > 200 * split
