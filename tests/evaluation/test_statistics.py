"""Intervals and paired tests against published and hand-counted values."""

import numpy as np
import pytest

from resprune.evaluation.statistics import paired, wilson


def test_wilson_of_a_published_example():
    """Newcombe (1998), table I: 81 of 263, score method without continuity correction."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_an_interval_has_its_share_in_it():
    for trials in range(1, 2001):  # rounding left the share of all hits outside for a quarter of them
        for hits in (0, trials):
            low, high = wilson(hits, trials)
            assert 0 <= low <= hits / trials <= high <= 1


def test_paired_counts_and_exact_p():
    first = np.array([True] * 6 + [False] * 3 + [True])
    second = np.array([False] * 6 + [True] + [False] * 2 + [True])
    same = np.array([False] * 7 + [True] * 3)
    found = paired(same, first, second)
    assert (found.lost, found.gained, found.agreement) == (6, 1, 0.3)
    # Two-sided binomial test of 1 in 7: 2 · (1 + 7) / 2^7.
    assert found.p == pytest.approx(2 * 8 / 128)


def test_without_a_difference_p_is_one():
    right = np.array([True, False])
    assert paired(np.array([True, True]), right, right).p == 1.0
