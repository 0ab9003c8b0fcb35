"""The ops `resprune::TextGain` and `resprune::ResidualSelect` as model-local functions of standard ONNX operators.

The bodies follow arXiv 2603.21105 and the rules in the README's section "The method". The selection is the
pivoted-Cholesky form: with the Gram matrix G = V Vᵀ and the columns kept so far in L,

    c = G[p] − L L[p]ᵀ,   l = c / √E_p,   E ← E − l²

gives the residual energies that Gram-Schmidt on V gives, at the cost of one row of G a step. Only operators that
ONNX Runtime and TensorRT both take are used: no NonZero, ArgMax on matrices only, Loops with a trip count only.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import onnxscript

DOMAIN = "resprune"
VERSION = 1
TEXT_GAIN = "TextGain"
RESIDUAL_SELECT = "ResidualSelect"
SCALES = ("minmax", "clamp", "shifted")
BODIES = ("loop", "unrolled")

TIE = 1e-5
"""Scores within a factor (1 - TIE) of the largest are tied; the lowest index among them is picked."""
EXHAUSTED = 1e-6
"""The span is exhausted once the best score is at most EXHAUSTED times the best score before any pick."""
FILL = 1e-7
"""Scores before any pick, times FILL, stand in for tokens without residual energy: below EXHAUSTED, so that a
token outside the span always comes first, and one maximum serves both rules."""


def text_gain_function(*, alpha: float, scale: str, opset: int) -> ir.Function:
    """`TextGain`: visual [B,N,D], text [B,M,D], text_mask [B,M], token_mask [B,N] → gain [B,N] float32 (Eq. 13).

    Raises:
        ValueError: an unknown scale or a negative alpha.

    """
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    if alpha < 0:
        raise ValueError(f"alpha must be at least 0, got {alpha}")

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
        if scale == "minmax":
            low = op.ReduceMin(op.Where(token_mask, relevance, 4.0), [1])
            high = op.ReduceMax(op.Where(token_mask, relevance, -4.0), [1])
            span = op.Sub(high, low)
            spread = op.Greater(span, 0.0)
            span = op.Where(spread, span, 1.0)
            scaled = op.Where(spread, op.Div(op.Sub(relevance, low), span), 1.0)
        elif scale == "clamp":
            scaled = relevance
        else:
            scaled = op.Mul(op.Add(relevance, 1.0), 0.5)
        gain = op.Pow(op.Clip(scaled, 0.0, 1.0), alpha)
        any_text = op.Greater(op.ReduceMax(op.Cast(text_mask, to=ir.DataType.FLOAT), [1]), 0.0)
        gain = op.Where(any_text, gain, 1.0)
        return op.Where(token_mask, gain, 0.0)

    return _function(TEXT_GAIN, body, ("visual", "text", "text_mask", "token_mask"), "gain", opset)


def residual_select_function(k: int, *, body: str, opset: int) -> ir.Function:
    """`ResidualSelect`: visual [B,N,D], gain [B,N], token_mask [B,N] → pick_order [B,k] int64.

    `body` is "loop" (one Loop of k steps) or "unrolled" (the same k steps in a row, for runtimes that capture a
    graph only without control flow, such as CUDA graphs).

    Raises:
        ValueError: k below 1, or an unknown body.

    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if body not in BODIES:
        raise ValueError(f"body must be one of {', '.join(BODIES)}, got {body!r}")

    def trace(op: Any, visual: Any, gain: Any, token_mask: Any) -> Any:
        state, fixed = _before_the_first_pick(op, visual, gain, token_mask, k)
        if body == "unrolled":
            picks = []
            for t in range(k):
                state, pick = _step(op, t, state, fixed, k)
                picks.append(pick)
            order = op.Concat(*picks, axis=1)
        else:
            order = _loop(op, state, fixed, k)
        valid = op.ReduceSum(op.Cast(token_mask, to=ir.DataType.INT64), [1])  # [B, 1]
        return op.Where(op.Less(list(range(k)), valid), order, -1)

    return _function(RESIDUAL_SELECT, trace, ("visual", "gain", "token_mask"), "pick_order", opset)


def _before_the_first_pick(op: Any, visual: Any, gain: Any, token_mask: Any, k: int) -> tuple[Any, Any]:
    V = _float32(op, visual, rank=3)  # [B, N, D]
    gain = _float32(op, gain, rank=2)  # [B, N]
    gram = op.MatMul(V, op.Transpose(V, perm=[0, 2, 1]))  # [B, N, N]
    batch, count = op.Shape(gain, start=0, end=1), op.Shape(gain, start=1, end=2)
    tokens = op.Range(0, op.Squeeze(count, [0]), 1)  # [N]
    # Energies come from the diagonal of G, not from V: a duplicate's residual then cancels to rounding.
    index = op.Unsqueeze(op.Expand(tokens, op.Shape(gain)), [2])  # [B, N, 1]
    energy = op.Squeeze(op.GatherElements(gram, index, axis=2), [2])  # [B, N]
    initial = op.Where(token_mask, op.Mul(gain, energy), 0.0)
    threshold = op.Mul(op.ReduceMax(initial, [1]), EXHAUSTED)  # [B, 1]
    fill = op.Where(token_mask, op.Mul(initial, FILL), -1.0)
    energy = op.Where(token_mask, energy, 0.0)
    columns = op.Expand(0.0, op.Concat(batch, [k], count, axis=0))  # [B, k, N]
    one_column = op.Concat(batch, [1], count, axis=0)
    return (energy, fill, columns), (gram, gain, tokens, threshold, one_column)


def _loop(op: Any, state: Any, fixed: Any, k: int) -> Any:
    """The k steps as a Loop with a trip count: pick order [B, k]."""

    def body(op: Any, t: Any, _: Any, *state: Any) -> Any:
        op.builder.push_module("step")  # names of its own: a Loop body may not shadow its function's
        state, pick = _step(op, t, state, fixed, k)
        # Not the condition that came in: TensorRT knows none where the Loop has a trip count only.
        return op.Identity(True), *state, pick

    rows = ir.Shape(["batch_size", "num_tokens"])
    carried = {"energy": rows, "fill": rows, "columns": ir.Shape(["batch_size", k, "num_tokens"])}
    loop_body = op.builder.subgraph(
        body,
        inputs=[
            ir.val("step", ir.DataType.INT64, []),
            ir.val("condition_in", ir.DataType.BOOL, []),
            *(ir.val(f"{name}_in", ir.DataType.FLOAT, shape) for name, shape in carried.items()),
        ],
        outputs=[
            ir.val("condition_out", ir.DataType.BOOL, []),
            *(ir.val(f"{name}_out") for name in carried),
            ir.val("pick", ir.DataType.INT64),
        ],
        name="select_one",
    )
    *_, picks = op.Loop(k, None, *state, body=loop_body, _outputs=4)  # [k, B, 1]
    return op.Transpose(op.Squeeze(picks, [2]), perm=[1, 0])


def _step(op: Any, t: Any, state: Any, fixed: Any, k: int) -> tuple[Any, Any]:
    """One pick [B, 1] and the state after it: energy [B, N], fill [B, N] (−1 once picked), columns [B, k, N]."""
    energy, fill, columns = state
    gram, gain, tokens, threshold, one_column = fixed
    score = op.Mul(gain, energy)
    score = op.Where(op.Greater(score, threshold), score, fill)
    tied = op.GreaterOrEqual(score, op.Mul(op.ReduceMax(score, [1]), 1 - TIE))
    pick = op.ArgMax(op.Cast(tied, to=ir.DataType.FLOAT), axis=1, keepdims=1)  # [B, 1]: the lowest tied index

    row = op.GatherND(gram, pick, batch_dims=1)  # [B, N]
    here = op.Expand(op.Unsqueeze(pick, [1]), [1, k, 1])  # [B, k, 1]
    earlier = op.Transpose(op.GatherElements(columns, here, axis=2), perm=[0, 2, 1])  # [B, 1, k]
    column = op.Sub(row, op.Squeeze(op.MatMul(earlier, columns), [1]))  # [B, N]
    # Once the span is exhausted this divides rounding by rounding, or 0 by 0. That does no harm: energies only fall,
    # or become NaN, and neither is above the threshold again, so every later pick is a fill.
    column = op.Div(column, op.Sqrt(op.GatherElements(energy, pick, axis=1)))

    picked = op.Equal(tokens, pick)  # [B, N]
    energy = op.Where(picked, 0.0, op.Sub(energy, op.Mul(column, column)))
    fill = op.Where(picked, -1.0, fill)
    columns = op.ScatterElements(columns, op.Expand(t, one_column), op.Unsqueeze(column, [1]), axis=1)
    return (energy, fill, columns), pick


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
        [
            ir.val(value, ir.DataType.BOOL, [None, None]) if value.endswith("mask") else ir.val(value)
            for value in inputs
        ],
        domain=DOMAIN,
        name=name,
        opset_imports={"": opset},
    )
