"""The arithmetic of the speed tables."""

from __future__ import annotations

import pytest

from benchmarks.speed import curves, figures, ideal_gain, ratio


def test_figures_add_up_turn_by_turn() -> None:
    reply = {
        "samples": {
            "": {"encode": [10.0, 30.0, 20.0]},
            "64": {"prefill": [2.0, 1.0, 3.0], "decode": [8.0, 4.0, 2.0]},
            "all": {"prefill": [8.0, 8.0, 9.0], "decode": [8.0, 8.0, 8.0]},
        },
        "prompt tokens": {"64": 100, "all": 600},
        "steps": 5,
        "memory": {"64": 1.0, "all": 2.0},
        "cache bytes a token": 32,
    }
    pruned = figures(reply)["64"]
    assert pruned["first token, samples"] == [12.0, 31.0, 23.0]
    assert pruned["first token"].median == 23.0  # not the sum of the stages' medians, 22
    assert pruned["prefill gain"].median == 4.0  # of 4, 8 and 3
    assert pruned["ideal gain"] == 6.0
    assert pruned["tokens per second"].median == 1e3 * 5 / 4
    assert pruned["cache bytes"] == 3200
    lines = curves(figures(reply), 576)
    assert lines["prefill"] == {64: 4.0, 576: 1.0}
    assert lines["first token, image and all"][64] == 29 / 23  # of 18/12, 38/31 and 29/23


def test_a_peer_that_failed_stays_a_fault() -> None:
    assert figures({"fault": "no such package"}) == {"fault": "no such package"}


def test_the_ideal_counts_the_text_as_well() -> None:
    assert ideal_gain(40 + 576, 40 + 64) == pytest.approx(5.923, abs=1e-3)


def test_ratios_are_of_the_same_turn() -> None:
    assert ratio([1.0, 10.0, 3.0], [2.0, 10.0, 2.0]).median == 1.0
