"""Energy outside a span against projections by least squares and against the SVD."""

import numpy as np
import pytest

from resprune.evaluation.reconstruction import energy_outside, svd_bound


def test_against_least_squares():
    visual = np.random.default_rng(0).normal(size=(12, 8))
    picks = np.array([3, 0, 7, 9])
    shares = energy_outside(visual, picks)
    assert shares[0] == 1
    for count in range(1, 5):
        basis = visual[picks[:count]].T
        left = visual.T - basis @ np.linalg.lstsq(basis, visual.T, rcond=None)[0]
        assert shares[count] == pytest.approx((left**2).sum() / (visual**2).sum())


def test_a_row_that_is_there_twice_adds_nothing():
    visual = np.vstack([np.eye(3), np.eye(3)])
    np.testing.assert_allclose(energy_outside(visual, np.array([0, 3, 1])), [1, 2 / 3, 2 / 3, 1 / 3])


def test_nothing_lies_below_the_bound():
    visual = np.random.default_rng(1).normal(size=(20, 6)) * np.arange(1, 7)
    bound = svd_bound(visual, 9)
    assert bound[0] == 1
    np.testing.assert_allclose(bound[6:], 0, atol=1e-12)
    leading = np.linalg.svd(visual)[2][:2]
    left = visual - visual @ leading.T @ leading
    assert bound[2] == pytest.approx((left**2).sum() / (visual**2).sum())
    assert (energy_outside(visual, np.arange(9)) >= bound - 1e-12).all()
