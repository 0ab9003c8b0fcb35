"""Selection as a graph of its own, or attached to the end of a vision encoder.

Both put one node of each op that is wanted in domain `resprune` into the main graph, with a model-local function of
the same name as its body and the attribute `plugin_namespace`: ONNX Runtime runs the function, TensorRT a plugin if
one is registered under that name and the function if not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript

from resprune.elements import ELEMENTS, FLOATS
from resprune.graphs.functions import (
    DOMAIN,
    VERSION,
    kept_counts_function,
    residual_select_function,
    text_gain_function,
)
from resprune.method import Selection
from resprune.names import (
    ATTACHED_TO,
    IMAGE_FEATURES,
    KEPT_COUNTS,
    KEPT_FEATURES,
    KEPT_INDICES,
    KEPT_PLANES,
    NUM_KEPT,
    PICK_ORDER,
    PLANE_FEATURES,
    PROTECTED_MASK,
    TEXT_EMBEDS,
    TEXT_MASK,
    TOKEN_MASK,
    TOKEN_SELECT,
)

OPSET = 20
"""Of the stand-alone selector; an attached selection takes the encoder's."""

IR_VERSION = 10
"""The first with model-local functions that also carry value information; ONNX Runtime 1.18 and later read it."""

MISSING = 2**24
"""Sorts after every index."""


def token_select_model(
    selection: Selection,
    *,
    dtype: str = "float32",
    planes: int = 0,
    protected: bool = False,
    attached: bool = False,
) -> onnx.ModelProto:
    """The stand-alone selector, for any number of tokens and any hidden size.

    Inputs: `image_features` [batch_size, num_tokens, hidden_size] and `text_embeds` [batch_size, text_tokens,
    hidden_size] of `dtype`, `token_mask` [batch_size, num_tokens] and `text_mask` [batch_size, text_tokens] bool.
    Outputs: `kept_features` [batch_size, k, hidden_size] float32 and `kept_indices` [batch_size, k] int64,
    ascending by index; `pick_order` [batch_size, k] int64. −1, with a row of zeros, where fewer than k exist.
    Arithmetic is float32 whatever the dtype.

    A `selection` that counts has one more input, `num_kept` [batch_size] int64, how many of the picks are kept, and
    one more output, `kept_counts` [batch_size, k] int64: how many tokens each kept row stands for, see
    `kept_counts_function`. With `planes` there are further inputs `plane_features.i` like `image_features`, and
    further outputs `kept_planes.i` like `kept_features`, gathered by the same indices. With `protected` there is one
    more input, `protected_mask` [batch_size, num_tokens] bool: rows that are always kept and counted in k, see
    `_protected_first`. With `attached` there is one more, `attached_to` [batch_size, num_tokens] int64: rows that are
    kept if and only if another row is, see `_with_attached`.

    Raises:
        ValueError: an unknown dtype.

    """
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be one of {', '.join(FLOATS)}, got {dtype!r}")
    element = ir.DataType(ELEMENTS[dtype].onnx)
    features = ir.val(IMAGE_FEATURES, element, ["batch_size", "num_tokens", "hidden_size"])
    further = [
        ir.val(PLANE_FEATURES.format(index), element, ["batch_size", "num_tokens", "hidden_size"])
        for index in range(planes)
    ]
    token_mask = ir.val(TOKEN_MASK, ir.DataType.BOOL, ["batch_size", "num_tokens"])
    graph = ir.Graph(
        [features, *further, token_mask],
        [],
        nodes=[],
        opset_imports={"": OPSET, DOMAIN: VERSION},
        name=TOKEN_SELECT,
    )
    op = onnxscript.GraphBuilder(graph).op
    functions = _select(
        op,
        [features, *further],
        token_mask,
        selection,
        protected=protected,
        attached=attached,
        kept_names=[KEPT_FEATURES, *map(KEPT_PLANES.format, range(planes))],
    )
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="resprune", functions=functions)
    return ir.to_proto(model)


def attach_selection(
    encoder: onnx.ModelProto,
    selection: Selection,
    *,
    padding: str | None = None,
    protected: bool = False,
    attached: bool = False,
) -> onnx.ModelProto:
    """`vision_select` from `vision_encoder`: the encoder's N rows go through the selection inside the graph.

    The encoder's output `image_features` [batch_size, N, D] is replaced by the K kept rows under the same name, and so
    is each output `plane_features.i`, with `kept_indices`, `pick_order` and, if the `selection` counts, `kept_counts`
    as in `token_select_model`; its inputs `text_embeds`, `text_mask` and, if it counts, `num_kept`, with `protected`
    `protected_mask`, with `attached` `attached_to` are added.
    Tensors in external files stay there: only their references are copied. `padding` names an int64 input
    [batch_size, N] of the encoder, or [batch_size, N, T], that is below 0 where an image with fewer tokens than the
    others has none; without it every token is a candidate. If the encoder has an output `token_mask` [batch_size, N]
    bool, that says which tokens are, and stays an output.

    Raises:
        ValueError: no output `image_features`, no input `padding`, or more k than tokens.

    """
    model = ir.from_proto(encoder)
    graph = model.graph
    output = next((value for value in graph.outputs if value.name == IMAGE_FEATURES), None)
    if output is None:
        raise ValueError("the encoder has no output image_features")
    num_tokens = None if output.shape is None else output.shape[1]
    if isinstance(num_tokens, int) and selection.k > num_tokens:
        raise ValueError(f"k must be at most the encoder's {num_tokens} tokens, got {selection.k}")
    every = [
        output,
        *(value for value in graph.outputs if (value.name or "").startswith(PLANE_FEATURES.format(""))),
    ]
    kept_names = [str(value.name) for value in every]
    for value in every:
        graph.outputs.remove(value)
        value.name = f"all_{value.name}"
    op = onnxscript.GraphBuilder(graph).op
    own_mask = next((value for value in graph.outputs if value.name == TOKEN_MASK), None)
    if own_mask is not None:
        candidates = own_mask
    elif padding is None:
        candidates = op.Expand(True, op.Shape(output, start=0, end=2))  # [B, N]
    else:
        source = next((value for value in graph.inputs if value.name == padding), None)
        if source is None:
            raise ValueError(f"the encoder has no input {padding}")
        of_token = source if len(source.shape or ()) == 2 else op.Gather(source, 0, axis=2)
        candidates = op.GreaterOrEqual(of_token, 0)
    functions = _select(
        op,
        every,
        candidates,
        selection,
        protected=protected,
        attached=attached,
        kept_names=kept_names,
    )
    graph.opset_imports[DOMAIN] = VERSION
    for function in functions:
        model.functions[function.identifier()] = function
    return ir.to_proto(model)


def _select(
    op: Any,
    planes: Sequence[ir.Value],
    token_mask: ir.Value,
    selection: Selection,
    *,
    protected: bool,
    attached: bool,
    kept_names: Sequence[str],
) -> list[ir.Function]:
    """Append the ops, the gathering of the kept rows, and the graph's outputs; return the ops' functions.

    The first of `planes` is what the selection sees; rows of all are gathered, and named by `kept_names`.
    """
    features, k = planes[0], selection.k
    graph = op.builder.graph
    op.builder.push_module("select")  # names of its own, whatever the encoder's are
    opset = graph.opset_imports[""]
    functions = [
        text_gain_function(selection, opset=opset),
        residual_select_function(selection, opset=opset),
    ]
    batch, num_tokens, hidden = features.shape or ("batch_size", "num_tokens", "hidden_size")
    text = ir.val(TEXT_EMBEDS, features.dtype, ir.Shape([batch, "text_tokens", hidden]))
    text_mask = ir.val(TEXT_MASK, ir.DataType.BOOL, ir.Shape([batch, "text_tokens"]))
    graph.inputs.extend([text, text_mask])

    ours: dict[str, Any] = {"_domain": DOMAIN, "_version": VERSION, "plugin_namespace": DOMAIN}
    candidates = token_mask
    if protected:
        protected_mask = ir.val(PROTECTED_MASK, ir.DataType.BOOL, ir.Shape([batch, num_tokens]))
        graph.inputs.append(protected_mask)
        candidates = op.And(token_mask, op.Not(protected_mask))
    if attached:
        attached_to = ir.val(ATTACHED_TO, ir.DataType.INT64, ir.Shape([batch, num_tokens]))
        graph.inputs.append(attached_to)
        free = op.Less(attached_to, 0)
        candidates = op.And(candidates, free)
    gain = op.TextGain(
        features, text, text_mask, candidates, alpha=selection.alpha, scale=selection.scale, **ours
    )
    gain.dtype = ir.DataType.FLOAT
    pick_order = op.ResidualSelect(features, gain, candidates, k=k, **ours)
    pick_order.dtype = ir.DataType.INT64
    if protected:
        always = op.And(token_mask, protected_mask)
        if attached:
            always = op.And(always, free)
        pick_order = _protected_first(op, always, pick_order, k)
    if attached:
        pick_order = _with_attached(op, attached_to, token_mask, pick_order, k)

    kept_indices, places = _ascending(op, pick_order, k)
    missing = op.Less(kept_indices, 0)
    present = op.Cast(op.Unsqueeze(op.Not(missing), [2]), to=ir.DataType.FLOAT)
    places_of_rows = op.Unsqueeze(op.Max(kept_indices, 0), [2])

    def kept(plane: ir.Value) -> Any:
        rows = op.GatherND(plane, places_of_rows, batch_dims=1)  # [B, K, D]
        return op.Mul(op.Cast(rows, to=ir.DataType.FLOAT), present)

    first, *further = [
        (kept(plane), name, ir.DataType.FLOAT, [batch, k, hidden])
        for plane, name in zip(planes, kept_names, strict=True)
    ]
    outputs = [
        first,
        (kept_indices, KEPT_INDICES, ir.DataType.INT64, [batch, k]),
        (pick_order, PICK_ORDER, ir.DataType.INT64, [batch, k]),
    ]
    if selection.counts:
        num_kept = ir.val(NUM_KEPT, ir.DataType.INT64, ir.Shape([batch]))
        graph.inputs.append(num_kept)
        if attached:
            num_kept = _whole_groups(op, attached_to, pick_order, num_kept, k)
        functions.append(kept_counts_function(opset=opset))
        counted = op.Where(op.Less(places, op.Unsqueeze(num_kept, [1])), kept_indices, -1)
        kept_counts = op.KeptCounts(features, token_mask, counted, **ours)
        outputs.append((kept_counts, KEPT_COUNTS, ir.DataType.INT64, [batch, k]))
    for value, name, dtype, shape in (*outputs, *further):
        value.name = name
        value.dtype = dtype
        value.shape = ir.Shape(shape)
        graph.outputs.append(value)
    return functions


def _ascending(op: Any, indices: Any, k: int) -> tuple[Any, Any]:
    """The k smallest of `indices` [B, n], ascending with the missing (−1) last, and their places: [B, k] int64 each.

    Sorted as float32, exact up to 2²⁴ tokens: TensorRT's TopK does not take int64.
    """
    missing_last = op.Where(op.Less(indices, 0), MISSING, indices)
    order = op.Cast(missing_last, to=ir.DataType.FLOAT)
    ascending, places = op.TopK(order, [k], axis=1, largest=0, sorted=1, _outputs=2)
    found = op.Cast(ascending, to=ir.DataType.INT64)
    return op.Where(op.Equal(found, MISSING), -1, found), places


def _first(op: Any, rows: Any, k: int) -> Any:
    """The indices of the first k of `rows` [B, N] bool that are true: [B, k], ascending with −1 last."""
    tokens = op.Range(0, op.Squeeze(op.Shape(rows, start=1, end=2), [0]), 1)  # [N]
    return _ascending(op, _more(op, op.Where(rows, tokens, -1), k), k)[0]


def _more(op: Any, indices: Any, k: int) -> Any:
    """`indices` [B, n] and k more that are missing, for TopK takes no more than there are: [B, n + k]."""
    batch = op.Shape(indices, start=0, end=1)
    return op.Concat(indices, op.Expand(-1, op.Concat(batch, [k], axis=0)), axis=1)


def _protected_first(op: Any, protected: Any, pick_order: Any, k: int) -> Any:
    """Rows of `protected` [B, N] ascending, then `pick_order` [B, k] as far as there is room: [B, k].

    Protected rows are no candidates: neither the gain nor the greedy choice sees them.
    """
    both = op.Concat(_first(op, protected, k), pick_order, axis=1)  # [B, 2k]
    places, _ = _ascending(op, op.Where(op.Less(both, 0), -1, list(range(2 * k))), k)
    return op.Where(op.Less(places, 0), -1, op.GatherElements(both, op.Max(places, 0), axis=1))


def _with_attached(op: Any, attached_to: Any, token_mask: Any, pick_order: Any, k: int) -> Any:
    """Each of `pick_order` [B, k] and behind it the rows attached to it, ascending, while whole groups fit: [B, k].

    A pick and its rows are a group. The first group that does not fit is left out, with all that come after it; −1
    stands in their places. Attached rows are no candidates, and padding among them is nobody's.
    """
    batch, count = op.Shape(attached_to, start=0, end=1), op.Shape(attached_to, start=1, end=2)
    attached = op.GreaterOrEqual(attached_to, 0)
    owners = op.Where(attached, attached_to, op.Range(0, op.Squeeze(count, [0]), 1))  # [B, N]
    # The place of each row's owner among the picks. One column more takes what is missing of them.
    places = op.Expand(-1, op.Concat(batch, op.Add(count, 1), axis=0))  # [B, N + 1]
    columns = op.Where(op.Less(pick_order, 0), count, pick_order)
    every = op.Expand(list(range(k)), op.Concat(batch, [k], axis=0))  # [B, k]
    places = op.ScatterElements(places, columns, every, axis=1)
    places = op.Where(token_mask, op.GatherElements(places, owners, axis=1), -1)  # [B, N]
    # Groups before that of the row k, from 0, of all in order are whole; there may be no such row.
    in_order, _ = _ascending(op, _more(op, places, k + 1), k + 1)
    cut = op.Slice(in_order, [k], [k + 1], [1])  # [B, 1]
    whole = op.Or(op.Less(places, cut), op.Less(cut, 0))
    kept = _first(op, op.And(op.GreaterOrEqual(places, 0), whole), k)  # [B, k], ascending
    # By group, the owner before the others, then by index. Counted, for these numbers are too large for float32.
    at = op.Max(kept, 0)
    behind = op.GatherElements(op.Cast(attached, to=ir.DataType.INT64), at, axis=1)
    key = op.Add(op.Mul(op.GatherElements(places, at, axis=1), 2), behind)
    key = op.Add(op.Mul(op.Where(op.Less(kept, 0), 2 * k, key), k), every)  # [B, k], each another
    before = op.Less(op.Unsqueeze(key, [1]), op.Unsqueeze(key, [2]))  # [B, k, k]
    order = op.ReduceSum(op.Cast(before, to=ir.DataType.INT64), [2], keepdims=0)
    return op.ScatterElements(kept, order, kept, axis=1)


def _whole_groups(op: Any, attached_to: Any, pick_order: Any, num_kept: Any, k: int) -> Any:
    """The first `num_kept` [B] of `pick_order` [B, k] without the part of a group at their end: how many, [B]."""
    order = _more(op, pick_order, 1)  # [B, k + 1]: a cut behind the last cuts no group
    attached = op.GreaterOrEqual(op.GatherElements(attached_to, op.Max(order, 0), axis=1), 0)
    inside = op.And(attached, op.GreaterOrEqual(order, 0))
    cuts = list(range(k + 1))
    no_cut = op.Or(inside, op.Greater(cuts, op.Unsqueeze(num_kept, [1])))
    return op.ReduceMax(op.Where(no_cut, 0, cuts), [1], keepdims=0)
