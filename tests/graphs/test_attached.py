"""Rows that are kept if and only if another one is: the graph, the reference, and the rule in plain words."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from resprune.exporter.verify.reference import (
    keep,
    kept_counts,
    protected_first,
    residual_select,
    text_gain,
    whole_groups,
    with_attached,
)
from resprune.graphs import token_select_model
from resprune.method import Selection
from tests.graphs.selectors import run


def grouped(to, token_mask, order, k):
    """The rule in plain words: groups in the order of their owners, one after the other, while they fit."""
    rows = []
    for owner in order:
        group = [owner] + [row for row in range(len(to)) if to[row] == owner and token_mask[row]]
        if len(rows) + len(group) > k:
            break
        rows += group
    return rows


def attached_at_random(rng, batch, tokens):
    """[batch, tokens] int64: no rows, some or most attached to any of the others, before them or behind."""
    to = np.full((batch, tokens), -1)
    for row in to:
        attached = rng.random(tokens) < rng.choice([0, 0.2, 0.5, 0.8])
        attached[rng.integers(tokens)] = False
        row[attached] = rng.choice(np.flatnonzero(~attached), attached.sum())
    return to


@pytest.mark.parametrize(
    ("k", "counts", "protect"), [(1, False, False), (6, True, True), (9, True, False), (9, False, True)]
)
def test_attached_rows_are_kept_with_their_owner(k, counts, protect):
    """Random groups, padding, budgets and protected rows; images of fewer tokens than k and than their batch."""
    rng = np.random.default_rng(k)
    model = token_select_model(Selection(k=k, counts=counts), planes=1, protected=protect, attached=True)
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    for _ in range(25):
        batch, tokens = rng.integers(1, 4), rng.integers(1, 21)
        visual, plane = rng.standard_normal((2, batch, tokens, 16)).astype(np.float32)
        text = rng.standard_normal((batch, 2, 16)).astype(np.float32)
        to, token_mask = attached_at_random(rng, batch, tokens), rng.random((batch, tokens)) < 0.8
        protected = (rng.random((batch, tokens)) < 0.2) & protect
        num_kept = rng.integers(1, k + 1, batch)
        feed = {"image_features": visual, "plane_features.0": plane, "token_mask": token_mask}
        feed |= {"text_embeds": text, "text_mask": np.ones((batch, 2), bool), "attached_to": to}
        feed |= {"protected_mask": protected} if protect else {}
        feed |= {"num_kept": num_kept} if counts else {}
        out = dict(zip(names, session.run(None, feed), strict=True))

        V, M, T = map(torch.from_numpy, (visual, token_mask, to))
        owners = M & (T < 0)
        always = torch.from_numpy(protected) & owners  # protection says nothing of an attached row
        free = owners & ~always
        greedy = residual_select(V, text_gain(V, torch.from_numpy(text), None, free), k, free)
        picks = protected_first(always, greedy)
        order = with_attached(T, picks, M)
        for row in range(batch):
            rows = grouped(to[row], token_mask[row], [pick for pick in picks[row].tolist() if pick >= 0], k)
            assert order[row].tolist() == rows + [-1] * (k - len(rows))
        rows, indices = keep(V, order)
        np.testing.assert_array_equal(out["pick_order"], order)
        np.testing.assert_array_equal(out["kept_indices"], indices)
        np.testing.assert_array_equal(out["kept_features"], rows)
        np.testing.assert_array_equal(out["kept_planes.0"], keep(torch.from_numpy(plane), order)[0])
        if counts:
            ends = whole_groups(T, order, torch.from_numpy(num_kept))
            for row, end in enumerate(ends.tolist()):  # a smaller budget keeps what a graph for it would
                smaller = with_attached(T, picks[:, : num_kept[row]], M)[row]
                assert order[row, :end].tolist() == smaller[:end].tolist()
                assert (smaller[end:] == -1).all()
            first = order.masked_fill(torch.arange(k) >= ends[:, None], -1)
            counted = indices.masked_fill((indices[:, :, None] != first[:, None, :]).all(dim=2), -1)
            np.testing.assert_array_equal(out["kept_counts"], kept_counts(V, counted, M))


@pytest.mark.parametrize(
    ("to", "k", "kept"),
    [
        ({}, 3, [4, 3, 2]),
        ({1: 3, 0: 3}, 4, [4, 3, 0, 1]),  # an owner, then its rows by index
        ({0: 2, 1: 3}, 4, [4, 3, 1]),  # 2 and its row are two, and one place is left
        ({0: 4, 1: 4}, 2, []),  # nor is anything kept that would fit after it
        ({4: 2}, 3, [3, 2, 4]),  # the best row is no candidate: it goes with 2, before it or behind
        ({4: 2, 0: 2}, 5, [3, 2, 0, 4, 1]),  # everything
        ({4: 2, 0: 2}, 7, [3, 2, 0, 4, 1]),
    ],
)
def test_attached_rows_by_hand(to, k, kept):
    """Five rows at right angles, of which a later one is longer, without text: the longest is picked first."""
    visual = np.diag(np.arange(1, 6)).astype(np.float32)[None]
    attached_to = np.array([[to.get(row, -1) for row in range(5)]])
    out = run(
        token_select_model(Selection(k=k), attached=True),
        visual,
        visual[:, :1],
        np.zeros((1, 1), bool),
        np.ones((1, 5), bool),
        attached_to=attached_to,
    )
    assert out["pick_order"].tolist() == [kept + [-1] * (k - len(kept))]
    assert out["kept_indices"].tolist() == [sorted(kept) + [-1] * (k - len(kept))]


def test_a_graph_without_attached_rows_picks_as_one_that_has_no_input_for_them():
    rng = np.random.default_rng(3)
    visual, text = (rng.standard_normal((2, rows, 16)).astype(np.float32) for rows in (20, 3))
    inputs = visual, text, np.ones((2, 3), bool), rng.random((2, 20)) < 0.7
    none = run(token_select_model(Selection(k=6), attached=True), *inputs, attached_to=np.full((2, 20), -1))
    for name, array in run(token_select_model(Selection(k=6)), *inputs).items():
        np.testing.assert_array_equal(none[name], array)
