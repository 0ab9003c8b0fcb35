"""Each selector against the shared vectors, a brute-force reading of its definition, or Gram-Schmidt by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from resprune.evaluation import selectors
from resprune.evaluation.selectors import CONTROLS, Candidates, greedy_map, resprune, stands_for, unit
from resprune.exporter.verify.reference import kept_counts, residual_select, text_gain
from tests.vectors import CASES

WHOLE = [case for case in CASES if case.arrays["token_mask"].all()]


def candidates(seed=0, n=14, d=9, m=3, seed_of=0):
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(n, d)) * np.linspace(0.5, 2, n)[:, None]
    return Candidates(rows, generator.normal(size=(m, d)), seed=seed_of)


@pytest.mark.parametrize("case", WHOLE, ids=lambda case: case.name)
def test_resprune_picks_those_of_the_vectors(case):
    text = case.arrays["text"][case.arrays["text_mask"].astype(bool)].astype(np.float64)
    of = Candidates(case.arrays["visual"].astype(np.float64), text, case.alpha, case.scale)
    wanted = case.arrays["pick_order"]
    np.testing.assert_array_equal(resprune(of, int((wanted >= 0).sum())), wanted[wanted >= 0])


@pytest.mark.parametrize("case", WHOLE, ids=lambda case: case.name)
def test_what_a_token_stands_for_is_the_reference_s(case):
    picks = case.arrays["pick_order"]
    for kept in (np.sort(picks[picks >= 0]), np.sort(picks[:2]), np.arange(len(case.arrays["visual"]))):
        nearest = stands_for(case.arrays["visual"], kept)
        assert nearest[kept].tolist() == list(range(len(kept)))
        counts = np.bincount(nearest, minlength=len(kept))
        reference = kept_counts(torch.from_numpy(case.arrays["visual"])[None], torch.from_numpy(kept)[None])
        np.testing.assert_array_equal(counts, reference[0].numpy())


def test_most_vectors_are_used():
    assert len(WHOLE) >= 10


def reference(of, text, **options):
    """Picks of the PyTorch reference in float64 inputs, for a text given as rows [M, D]."""
    visual = torch.from_numpy(of.visual)[None]
    gain = text_gain(visual, torch.from_numpy(text)[None], **options)
    return residual_select(visual, gain, 6)[0].numpy()


def test_without_text_is_the_reference_at_alpha_0():
    of = candidates(1)
    np.testing.assert_array_equal(CONTROLS["no-text"](of, 6), reference(of, of.text, alpha=0.0))


def test_pooled_relevance_is_the_reference_with_one_mean_text_token():
    of = candidates(2)
    np.testing.assert_array_equal(CONTROLS["pooled"](of, 6), reference(of, of.text.mean(0, keepdims=True)))


def test_mean_relevance_is_the_reference_with_the_mean_direction():
    """Under min-max, a mean of cosines and the cosine with the mean of unit vectors scale to the same gain."""
    of = candidates(3)
    np.testing.assert_array_equal(
        CONTROLS["mean"](of, 6), reference(of, unit(of.text).mean(0, keepdims=True))
    )


def test_negative_guidance_is_the_reference_with_one_text_token_reversed():
    of = candidates(4, m=1)
    np.testing.assert_array_equal(CONTROLS["negative"](of, 6), reference(of, -of.text))


def test_negative_guidance_of_a_clamped_gain_is_shifted():
    """Clamped, −r of rows that are all near the text is 0, and what remains is the order of their indices."""
    of = candidates(4, m=1)
    near = replace(of, visual=of.visual + 9 * of.text, scale="clamp")
    picks = CONTROLS["negative"](near, 6)
    np.testing.assert_array_equal(picks, reference(near, -near.text, scale="shifted"))
    assert picks.tolist() != list(range(6))


def test_relevance_alone_is_the_largest_cosines():
    of = candidates(5)
    cosine = [max(v @ t / np.linalg.norm(v) / np.linalg.norm(t) for t in of.text) for v in of.visual]
    assert CONTROLS["relevance"](of, 4).tolist() == sorted(range(14), key=lambda i: -cosine[i])[:4]


def test_largest_norm():
    of = Candidates(np.diag([1.0, 3.0, 2.0, 3.0]), np.zeros((0, 4)))
    assert CONTROLS["norm"](of, 3).tolist() == [1, 3, 2]


def test_stride_is_even():
    of = candidates(n=12)
    assert CONTROLS["stride"](of, 3).tolist() == [2, 6, 10]
    assert CONTROLS["stride"](of, 12).tolist() == list(range(12))


def test_random_depends_on_its_seed_alone():
    first, again, other = (
        CONTROLS["random"](candidates(seed, seed_of=draw), 6)
        for seed, draw in ((1, (3, 5)), (2, (3, 5)), (1, (3, 6)))
    )
    np.testing.assert_array_equal(first, again)
    assert first.tolist() != other.tolist()


def test_divprune_is_max_min_distance_by_brute_force():
    of = candidates(6)
    rows = [v / np.linalg.norm(v) for v in of.visual]

    def distance(i, j):
        return 1 - rows[i] @ rows[j]

    others = set(range(14))
    picks = [max(others, key=lambda i: min(distance(i, j) for j in others - {i}))]
    while len(picks) < 6:
        picks.append(max(others - set(picks), key=lambda i: min(distance(i, j) for j in picks)))
    assert CONTROLS["divprune"](of, 6).tolist() == picks


def greedy_determinants(kernel, k):
    """Greedy MAP by its definition: the pick that makes the determinant of the kept rows and columns largest."""
    picks = []
    while len(picks) < k:
        rest = [i for i in range(len(kernel)) if i not in picks]
        picks.append(max(rest, key=lambda i: np.linalg.det(kernel[np.ix_([*picks, i], [*picks, i])])))
    return picks


def test_greedy_map_by_brute_force():
    rows = np.random.default_rng(7).normal(size=(12, 8))
    assert greedy_map(rows @ rows.T, 6).tolist() == greedy_determinants(rows @ rows.T, 6)


def test_cdpruner_is_greedy_on_its_kernel():
    of = candidates(8)
    cosine = np.array([[v @ t / np.linalg.norm(v) / np.linalg.norm(t) for t in of.text] for v in of.visual])
    mean = cosine.mean(1)
    relevance = (mean - mean.min()) / (mean.max() - mean.min())
    rows = [v / np.linalg.norm(v) for v in of.visual]
    kernel = np.array(
        [[relevance[i] * (rows[i] @ rows[j]) * relevance[j] for j in range(14)] for i in range(14)]
    )
    assert CONTROLS["cdpruner"](of, 6).tolist() == greedy_determinants(kernel, 6)


@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize("text_tokens", [0, 2])
def test_every_selector_keeps_k_different_tokens(name, text_tokens):
    """Also more than there are directions, without any text, and all of them."""
    of = candidates(9, n=14, d=5, m=text_tokens)
    for k in (1, 7, 14):
        picks = CONTROLS[name](of, k)
        assert picks.shape == (k,)
        assert len(set(picks.tolist())) == k
        assert picks.min() >= 0
        assert picks.max() < 14


def test_scales():
    relevance = np.array([-0.5, 0.0, 0.5])
    np.testing.assert_allclose(selectors.scaled(relevance, "minmax"), [0, 0.5, 1])
    np.testing.assert_allclose(selectors.scaled(relevance, "clamp"), [0, 0, 0.5])
    np.testing.assert_allclose(selectors.scaled(relevance, "shifted"), [0.25, 0.5, 0.75])
    np.testing.assert_allclose(selectors.scaled(np.full(3, 0.2), "minmax"), [1, 1, 1])
