"""Where one form of the selection overtakes the other."""

from __future__ import annotations

import pytest

from benchmarks.growth import SHARES, budgets, crossover, up_to
from benchmarks.measure import timing


def test_the_crossover_is_read_off_a_line_and_is_no_figure_past_what_was_measured() -> None:
    N = 576
    timings = {}
    for k in budgets(N):
        timings[f"linear K {k}"] = timing([0.1 * k])
        timings[f"quadratic K {k}"] = timing([10.0])
    share = crossover(N, timings)
    assert share * N == pytest.approx(100)
    assert up_to(N, share) == "K = 100, 17.4%"
    assert max(SHARES) > 0.292  # the largest that there was
    assert up_to(N, 0.4) == "every K that was tried"
    assert up_to(N, 0.01) == "no K that was tried"
