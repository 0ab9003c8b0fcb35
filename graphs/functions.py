"""The ops `resprune::TextGain`, `ResidualSelect` and `KeptCounts` as model-local functions of standard ONNX operators.

The first two follow arXiv 2603.21105 and the rules in docs/method.md. The selection is the
pivoted Cholesky factorisation of the Gram matrix G = V Vᵀ: with the columns so far in L,

    c = G[p] − L L[p]ᵀ,   l = c / √E_p,   E ← E − l²

gives the residual energies that Gram-Schmidt on V gives, at the cost of one row of G a step. In the quadratic form G
is made once; in the linear form its rows are, as V v_p, when they are needed. Only operators that ONNX Runtime and
TensorRT both take are used: no NonZero, ArgMax on matrices only, Loops with a trip count only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import onnxscript

from resprune.method import EXHAUSTED, FILL, TIE, Selection

DOMAIN = "resprune"
VERSION = 1
TEXT_GAIN = "TextGain"
RESIDUAL_SELECT = "ResidualSelect"
KEPT_COUNTS = "KeptCounts"
EARLY_SELECT = "EarlySelect"
"""`ResidualSelect` of another k, inside the vision tower: a function has one body, so it needs a name of its own."""

CACHED_SHARE, STREAMED_SHARE = 1 / 4, 1 / 10
"""Shares k / N up to which the linear form is the faster one, with V in the cache and without."""
CACHE_BYTES = 16 << 20
GRAM_BYTES = 256 << 20
"""Above it G is not made, whatever it would gain: 8,192 tokens."""
KNOWN = {
    "text_mask": (ir.DataType.BOOL, [None, None]),
    "token_mask": (ir.DataType.BOOL, [None, None]),
    "kept_indices": (ir.DataType.INT64, [None, None]),
}
"""Type and rank of the functions' inputs that have one of their own, whatever the graph around them."""
SEGMENT = 64
"""Steps that share a buffer of columns. ONNX Runtime copies what a Loop carries once a step, so columns of earlier
segments are read from outside: N 2,928, K 640 took 748 ms with one buffer, 553 ms with buffers of 64."""


def text_gain_function(selection: Selection, *, opset: int) -> ir.Function:
    """`TextGain`: visual [B,N,D], text [B,M,D], text_mask [B,M], token_mask [B,N] → gain [B,N] float32 (Eq. 13)."""

    def body(op: Any, visual: Any, text: Any, text_mask: Any, token_mask: Any) -> Any:
        V = _float32(op, visual, rank=3)  # [B, N, D]
        T = _float32(op, text, rank=3)  # [B, M, D]
        # One more row that is masked out: a maximum over no row at all is not defined.
        batch, dim = op.Shape(T, start=0, end=1), op.Shape(T, start=2, end=3)
        T = op.Concat(T, op.Expand(0.0, op.Concat(batch, [1], dim, axis=0)), axis=1)
        text_mask = op.Concat(text_mask, op.Expand(False, op.Concat(batch, [1], axis=0)), axis=1)

        T = op.Mul(T, _inverse_norm(op, T))
        cosine = op.Mul(op.MatMul(V, op.Transpose(T, perm=[0, 2, 1])), _inverse_norm(op, V))  # [B, N, M + 1]
        cosine = op.Where(op.Unsqueeze(text_mask, [1]), cosine, -2.0)  # below any cosine
        relevance = op.ReduceMax(cosine, [2], keepdims=0)  # [B, N]
        if selection.scale == "minmax":
            low = op.ReduceMin(op.Where(token_mask, relevance, 4.0), [1])
            high = op.ReduceMax(op.Where(token_mask, relevance, -4.0), [1])
            span = op.Sub(high, low)
            spread = op.Greater(span, 0.0)
            span = op.Where(spread, span, 1.0)
            scaled = op.Where(spread, op.Div(op.Sub(relevance, low), span), 1.0)
        elif selection.scale == "clamp":
            scaled = relevance
        else:
            scaled = op.Mul(op.Add(relevance, 1.0), 0.5)
        gain = op.Pow(op.Clip(scaled, 0.0, 1.0), selection.alpha)
        any_text = op.Greater(op.ReduceMax(op.Cast(text_mask, to=ir.DataType.FLOAT), [1]), 0.0)
        gain = op.Where(any_text, gain, 1.0)
        return op.Where(token_mask, gain, 0.0)

    return _function(TEXT_GAIN, body, ("visual", "text", "text_mask", "token_mask"), "gain", opset)


def choose_form(k: int, num_tokens: int, hidden_size: int) -> str:
    """The faster form for k of N tokens of D numbers, or the one that fits: "quadratic" or "linear".

    G takes N² D multiplications that a processor does at its full rate, and the linear form N D a pick that wait for
    memory: which wins is a matter of k / N, and of whether V stays in the cache from pick to pick. The bounds are
    measured (docs/benchmarks.md); where N is large a linear form takes less memory.
    """
    if 4 * num_tokens**2 > GRAM_BYTES:
        return "linear"
    cached = 4 * num_tokens * hidden_size <= CACHE_BYTES
    return "linear" if k <= num_tokens * (CACHED_SHARE if cached else STREAMED_SHARE) else "quadratic"


def residual_select_function(selection: Selection, *, opset: int, name: str = RESIDUAL_SELECT) -> ir.Function:
    """`ResidualSelect`: visual [B,N,D], gain [B,N], token_mask [B,N] → pick_order [B,k] int64.

    A Loop has up to SEGMENT steps. `choose_form` knows which form is the faster one.
    """
    k = selection.k
    several_steps = _loop if selection.body == "loop" else _unrolled
    products = _quadratic if selection.form == "quadratic" else _linear

    def trace(op: Any, visual: Any, gain: Any, token_mask: Any) -> Any:
        V = _float32(op, visual, rank=3)  # [B, N, D]
        gain = _float32(op, gain, rank=2)  # [B, N]
        shape = op.Shape(gain)
        batch, count = op.Shape(gain, start=0, end=1), op.Shape(gain, start=1, end=2)
        tokens = op.Range(0, op.Squeeze(count, [0]), 1)  # [N]
        energy, row_of = products(op, V, op.Expand(tokens, shape))
        initial = op.Where(token_mask, op.Mul(gain, energy), 0.0)
        threshold = op.Mul(op.ReduceMax(initial, [1]), EXHAUSTED)  # [B, 1]
        fill = op.Where(token_mask, op.Mul(initial, FILL), -1.0)
        energy = op.Where(token_mask, energy, 0.0)
        one_column = op.Concat(batch, [1], count, axis=0)
        past, picks = None, []
        for first in range(0, k, SEGMENT):
            steps = min(SEGMENT, k - first)
            fixed = _Fixed(row_of, gain, tokens, threshold, past, one_column, first, steps)
            columns = op.Expand(0.0, op.Concat(batch, [steps], count, axis=0))  # [B, steps, N]
            op.builder.push_module(f"from_{first}")
            (energy, fill, columns), order = several_steps(op, (energy, fill, columns), fixed)
            op.builder.pop_module()
            picks.append(order)
            # Transposed, and not for speed: TensorRT fails on what a Loop gives if the next one reads it as it is.
            columns = op.Transpose(columns, perm=[0, 2, 1])  # [B, N, steps]
            past = columns if past is None else op.Concat(past, columns, axis=2)  # [B, N, first + steps]
        valid = op.ReduceSum(op.Cast(token_mask, to=ir.DataType.INT64), [1])  # [B, 1]
        missing = op.Expand(-1, op.Concat(batch, [k], axis=0))  # of Loops that had no more tokens
        order = op.Slice(op.Concat(*picks, missing, axis=1), [0], [k], [1])
        return op.Where(op.Less(list(range(k)), valid), order, -1)

    return _function(name, trace, ("visual", "gain", "token_mask"), "pick_order", opset)


def kept_counts_function(*, opset: int) -> ir.Function:
    """`KeptCounts`: visual [B,N,D], token_mask [B,N], kept_indices [B,K] ascending, −1 for none → counts [B,K] int64.

    How many of an image's tokens each kept one stands for: itself, and every dropped token whose largest cosine with
    a kept one is the one with it. The counts add up to the image's tokens; where there is no index, 0.
    """

    def body(op: Any, visual: Any, token_mask: Any, kept_indices: Any) -> Any:
        V = _float32(op, visual, rank=3)  # [B, N, D]
        tokens = op.Range(0, op.Squeeze(op.Shape(V, start=1, end=2), [0]), 1)  # [N]
        places = op.Range(0, op.Squeeze(op.Shape(kept_indices, start=1, end=2), [0]), 1)  # [K]
        rows = op.GatherND(V, op.Unsqueeze(op.Max(kept_indices, 0), [2]), batch_dims=1)  # [B, K, D]
        rows = op.Mul(rows, _inverse_norm(op, rows))
        cosine = op.Mul(op.MatMul(V, op.Transpose(rows, perm=[0, 2, 1])), _inverse_norm(op, V))  # [B, N, K]
        columns = op.Unsqueeze(kept_indices, [1])  # [B, 1, K]
        itself = op.Equal(op.Unsqueeze(tokens, [1]), columns)
        cosine = op.Where(itself, 2.0, cosine)  # above any cosine
        cosine = op.Where(op.GreaterOrEqual(columns, 0), cosine, -2.0)  # below any cosine
        tied = op.GreaterOrEqual(cosine, op.Sub(op.ReduceMax(cosine, [2]), TIE))
        # The first of the tied, which is the lowest index: [B, N, 1].
        nearest = op.ArgMax(op.Cast(tied, to=ir.DataType.FLOAT), axis=2, keepdims=1)
        counted = op.And(op.Equal(nearest, places), op.Unsqueeze(token_mask, [2]))
        counts = op.ReduceSum(op.Cast(counted, to=ir.DataType.INT64), [1], keepdims=0)
        return op.Where(op.GreaterOrEqual(kept_indices, 0), counts, 0)

    return _function(KEPT_COUNTS, body, ("visual", "token_mask", "kept_indices"), "counts", opset)


@dataclass(frozen=True)
class _Fixed:
    """What the steps of one segment read and never write."""

    row_of: Callable[[Any, Any], Any]  # (op, pick [B, 1]) → G[pick] [B, N]
    gain: Any  # [B, N]
    tokens: Any  # [N]: 0, 1, 2 …
    threshold: Any  # [B, 1]
    past: Any  # [B, N, first]: the columns of the segments before, None in the first
    one_column: Any  # the shape [B, 1, N]
    first: int
    steps: int


def _quadratic(op: Any, V: Any, tokens: Any) -> tuple[Any, Callable[[Any, Any], Any]]:
    """Energies [B, N] and rows of G = V Vᵀ, computed once."""
    gram = op.MatMul(V, op.Transpose(V, perm=[0, 2, 1]))  # [B, N, N]
    # Energies come from the diagonal of G, not from V: a duplicate's residual then cancels to rounding.
    energy = op.Squeeze(op.GatherElements(gram, op.Unsqueeze(tokens, [2]), axis=2), [2])
    return energy, lambda op, pick: op.GatherND(gram, pick, batch_dims=1)


def _linear(op: Any, V: Any, tokens: Any) -> tuple[Any, Callable[[Any, Any], Any]]:
    """Energies [B, N] and rows of G, each V v_p when it is needed."""
    norms = op.ReduceSumSquare(V, [2], keepdims=0)  # [B, N]

    def row_of(op: Any, pick: Any) -> Any:
        row = _products(op, V, pick)
        # Two ways to add D products differ by rounding, which is no energy: the row is scaled so that its entry at
        # the pick is the pick's own norm. A duplicate's residual then cancels here too.
        return op.Mul(
            row, op.Div(op.GatherElements(norms, pick, axis=1), op.GatherElements(row, pick, axis=1))
        )

    return norms, row_of


def _unrolled(op: Any, state: Any, fixed: _Fixed) -> tuple[Any, Any]:
    """The steps in a row: the state after them, and their picks [B, steps]."""
    picks = []
    for t in range(fixed.steps):
        state, pick = _step(op, t, state, fixed)
        picks.append(pick)
    return state, op.Concat(*picks, axis=1)


def _loop(op: Any, state: Any, fixed: _Fixed) -> tuple[Any, Any]:
    """The steps as a Loop with a trip count: the state after them, and their picks [B, at most steps]."""

    def body(op: Any, t: Any, _: Any, *state: Any) -> Any:
        op.builder.push_module("step")  # names of its own: a Loop body may not shadow its function's
        state, pick = _step(op, t, state, fixed)
        # Not the condition that came in: TensorRT knows none where the Loop has a trip count only.
        return op.Identity(True), *state, pick

    left = op.Sub(op.Size(fixed.tokens), fixed.first)
    trips = op.Min(
        op.Max(left, 0), fixed.steps
    )  # an image of fewer than k tokens needs no more steps than it has
    at = fixed.first  # in the names too, so that nobody has to keep those of two Loops apart
    rows = ir.Shape(["batch_size", "num_tokens"])
    carried = {"energy": rows, "fill": rows, "columns": ir.Shape(["batch_size", fixed.steps, "num_tokens"])}
    loop_body = op.builder.subgraph(
        body,
        inputs=[
            ir.val(f"step_{at}", ir.DataType.INT64, []),
            ir.val(f"condition_in_{at}", ir.DataType.BOOL, []),
            *(ir.val(f"{name}_in_{at}", ir.DataType.FLOAT, shape) for name, shape in carried.items()),
        ],
        outputs=[
            ir.val(f"condition_out_{at}", ir.DataType.BOOL, []),
            *(ir.val(f"{name}_out_{at}") for name in carried),
            ir.val(f"pick_{at}", ir.DataType.INT64),
        ],
        name="select_some",
    )
    *state, picks = op.Loop(trips, None, *state, body=loop_body, _outputs=4)  # picks [trips, B, 1]
    return tuple(state), op.Transpose(op.Squeeze(picks, [2]), perm=[1, 0])


def _step(op: Any, t: Any, state: Any, fixed: _Fixed) -> tuple[Any, Any]:
    """One pick [B, 1] and the state after it: energy [B, N], fill [B, N] (−1 once picked), columns [B, steps, N]."""
    energy, fill, columns = state
    score = op.Mul(fixed.gain, energy)
    score = op.Where(op.Greater(score, fixed.threshold), score, fill)
    tied = op.GreaterOrEqual(score, op.Mul(op.ReduceMax(score, [1]), 1 - TIE))
    pick = op.ArgMax(op.Cast(tied, to=ir.DataType.FLOAT), axis=1, keepdims=1)  # [B, 1]: the lowest tied index

    column = fixed.row_of(op, pick)
    if fixed.past is not None:
        column = op.Sub(column, _products(op, fixed.past, pick))
    here = op.Expand(op.Unsqueeze(pick, [1]), [1, fixed.steps, 1])
    earlier = op.Transpose(op.GatherElements(columns, here, axis=2), perm=[0, 2, 1])  # [B, 1, steps]
    column = op.Sub(column, op.Squeeze(op.MatMul(earlier, columns), [1]))
    # Once the span is exhausted this divides rounding by rounding, or 0 by 0. That does no harm: energies only fall,
    # or become NaN, and neither is above the threshold again, so every later pick is a fill.
    column = op.Div(column, op.Sqrt(op.GatherElements(energy, pick, axis=1)))

    picked = op.Equal(fixed.tokens, pick)  # [B, N]
    energy = op.Where(picked, 0.0, op.Sub(energy, op.Mul(column, column)))
    fill = op.Where(picked, -1.0, fill)
    columns = op.ScatterElements(columns, op.Expand(t, fixed.one_column), op.Unsqueeze(column, [1]), axis=1)
    return (energy, fill, columns), pick


def _products(op: Any, rows: Any, pick: Any) -> Any:
    """The product of the pick's row with every row of [B, N, R]: [B, N]."""
    row = op.GatherND(rows, pick, batch_dims=1)  # [B, R]
    return op.Squeeze(op.MatMul(rows, op.Unsqueeze(row, [2])), [2])


def _float32(op: Any, value: Any, *, rank: int) -> Any:
    """`value` in float32, with what the builder needs to give the Python numbers beside it their type."""
    cast = op.Cast(value, to=ir.DataType.FLOAT)
    cast.dtype = ir.DataType.FLOAT
    cast.shape = ir.Shape([None] * rank)
    return cast


def _inverse_norm(op: Any, rows: Any) -> Any:
    """1 / ‖row‖ as [..., 1], 0 for a zero row: its cosine with everything is 0."""
    norm = op.Sqrt(op.ReduceSumSquare(rows, [-1]))
    nonzero = op.Greater(norm, 0.0)
    return op.Where(nonzero, op.Reciprocal(op.Where(nonzero, norm, 1.0)), 0.0)


def _function(name: str, body: Any, inputs: tuple[str, ...], output: str, opset: int) -> ir.Function:
    def named(op: Any, *values: Any) -> Any:
        return op.Identity(body(op, *values), _outputs=[output])

    return onnxscript.build_function(
        named,
        [ir.val(value, *known) if (known := KNOWN.get(value)) else ir.val(value) for value in inputs],
        domain=DOMAIN,
        name=name,
        opset_imports={"": opset},
    )
