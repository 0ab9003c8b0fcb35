"""Selection as a graph of its own, or attached to the end of a vision encoder.

Both put one node of each op that is wanted in domain `resprune` into the main graph, with a model-local function of
the same name as its body and the attribute `plugin_namespace`: ONNX Runtime runs the function, TensorRT a plugin if
one is registered under that name and the function if not.
"""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir
import onnxscript

from resprune.graphs.functions import (
    DOMAIN,
    VERSION,
    kept_counts_function,
    residual_select_function,
    text_gain_function,
)

OPSET = 20
"""Of the stand-alone selector; an attached selection takes the encoder's."""

IR_VERSION = 10
"""The first with model-local functions that also carry value information; ONNX Runtime 1.18 and later read it."""

DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}


def token_select_model(
    k: int,
    *,
    alpha: float,
    scale: str,
    body: str = "loop",
    form: str = "quadratic",
    counts: bool = False,
    dtype: str = "float32",
) -> onnx.ModelProto:
    """The stand-alone selector, for any number of tokens and any hidden size.

    Inputs: `image_features` [batch_size, num_tokens, hidden_size] and `text_embeds` [batch_size, text_tokens,
    hidden_size] of `dtype`, `token_mask` [batch_size, num_tokens] and `text_mask` [batch_size, text_tokens] bool.
    Outputs: `kept_features` [batch_size, k, hidden_size] float32 and `kept_indices` [batch_size, k] int64,
    ascending by index; `pick_order` [batch_size, k] int64. −1, with a row of zeros, where fewer than k exist.
    Arithmetic is float32 whatever the dtype.

    `form` is "quadratic" or "linear", see `choose_form`. With `counts` there is one more input, `num_kept`
    [batch_size] int64, how many of the picks are kept, and one more output, `kept_counts` [batch_size, k] int64: how
    many tokens each kept row stands for, see `kept_counts_function`.

    Raises:
        ValueError: k below 1, alpha below 0, or an unknown scale, body, form or dtype.

    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    features = ir.val("image_features", DTYPES[dtype], ["batch_size", "num_tokens", "hidden_size"])
    token_mask = ir.val("token_mask", ir.DataType.BOOL, ["batch_size", "num_tokens"])
    graph = ir.Graph(
        [features, token_mask], [], nodes=[], opset_imports={"": OPSET, DOMAIN: VERSION}, name="token_select"
    )
    op = onnxscript.GraphBuilder(graph).op
    functions = _select(
        op,
        features,
        token_mask,
        k,
        alpha=alpha,
        scale=scale,
        body=body,
        form=form,
        counts=counts,
        kept_name="kept_features",
    )
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="resprune", functions=functions)
    return ir.to_proto(model)


def attach_selection(
    encoder: onnx.ModelProto,
    k: int,
    *,
    alpha: float,
    scale: str,
    body: str = "loop",
    form: str = "quadratic",
    counts: bool = False,
    padding: str | None = None,
) -> onnx.ModelProto:
    """`vision_select` from `vision_encoder`: the encoder's N rows go through the selection inside the graph.

    The encoder's output `image_features` [batch_size, N, D] is replaced by the K kept rows under the same name, with
    `kept_indices`, `pick_order` and, with `counts`, `kept_counts` as in `token_select_model`; its inputs `text_embeds`,
    `text_mask` and, with `counts`, `num_kept` are added.
    Tensors in external files stay there: only their references are copied. `padding` names an int64 input
    [batch_size, N] of the encoder that is below 0 where a picture with fewer tokens than the others has none; without
    it every token is a candidate.

    Raises:
        ValueError: no output `image_features`, no input `padding`, k outside 1 … N, or an unknown scale, body or form.

    """
    model = ir.from_proto(encoder)
    graph = model.graph
    output = next((value for value in graph.outputs if value.name == "image_features"), None)
    if output is None:
        raise ValueError("the encoder has no output image_features")
    num_tokens = None if output.shape is None else output.shape[1]
    if isinstance(num_tokens, int) and k > num_tokens:
        raise ValueError(f"k must be at most the encoder's {num_tokens} tokens, got {k}")
    output.name = "all_image_features"
    graph.outputs.remove(output)
    op = onnxscript.GraphBuilder(graph).op
    if padding is None:
        candidates = op.Expand(True, op.Shape(output, start=0, end=2))  # [B, N]
    else:
        source = next((value for value in graph.inputs if value.name == padding), None)
        if source is None:
            raise ValueError(f"the encoder has no input {padding}")
        candidates = op.GreaterOrEqual(source, 0)
    functions = _select(
        op,
        output,
        candidates,
        k,
        alpha=alpha,
        scale=scale,
        body=body,
        form=form,
        counts=counts,
        kept_name="image_features",
    )
    graph.opset_imports[DOMAIN] = VERSION
    for function in functions:
        model.functions[function.identifier()] = function
    return ir.to_proto(model)


def _select(
    op: Any,
    features: ir.Value,
    token_mask: ir.Value,
    k: int,
    *,
    alpha: float,
    scale: str,
    body: str,
    form: str,
    counts: bool,
    kept_name: str,
) -> list[ir.Function]:
    """Append the ops, the gathering of the kept rows, and the graph's outputs; return the ops' functions."""
    graph = op.builder.graph
    op.builder.push_module("select")  # names of its own, whatever the encoder's are
    opset = graph.opset_imports[""]
    functions = [
        text_gain_function(alpha=alpha, scale=scale, opset=opset),
        residual_select_function(k, body=body, form=form, opset=opset),
    ]
    batch, _, hidden = features.shape or ("batch_size", "num_tokens", "hidden_size")
    text = ir.val("text_embeds", features.dtype, ir.Shape([batch, "text_tokens", hidden]))
    text_mask = ir.val("text_mask", ir.DataType.BOOL, ir.Shape([batch, "text_tokens"]))
    graph.inputs.extend([text, text_mask])

    ours: dict[str, Any] = {"_domain": DOMAIN, "_version": VERSION, "plugin_namespace": DOMAIN}
    gain = op.TextGain(features, text, text_mask, token_mask, alpha=alpha, scale=scale, **ours)
    gain.dtype = ir.DataType.FLOAT
    pick_order = op.ResidualSelect(features, gain, token_mask, k=k, **ours)
    pick_order.dtype = ir.DataType.INT64

    # Ascending by index with the missing (−1) last. Sorted as float32, exact up to 2²⁴ tokens: TensorRT's TopK
    # does not take int64.
    missing_last = op.Where(op.Less(pick_order, 0), 2**24, pick_order)
    order = op.Cast(missing_last, to=ir.DataType.FLOAT)
    ascending, places = op.TopK(order, [k], axis=1, largest=0, sorted=1, _outputs=2)
    indices = op.Cast(ascending, to=ir.DataType.INT64)
    missing = op.Equal(indices, 2**24)
    kept_indices = op.Where(missing, -1, indices)
    rows = op.GatherND(features, op.Unsqueeze(op.Max(kept_indices, 0), [2]), batch_dims=1)  # [B, K, D]
    present = op.Cast(op.Unsqueeze(op.Not(missing), [2]), to=ir.DataType.FLOAT)
    kept = op.Mul(op.Cast(rows, to=ir.DataType.FLOAT), present)

    outputs = [
        (kept, kept_name, ir.DataType.FLOAT, [batch, k, hidden]),
        (kept_indices, "kept_indices", ir.DataType.INT64, [batch, k]),
        (pick_order, "pick_order", ir.DataType.INT64, [batch, k]),
    ]
    if counts:
        num_kept = ir.val("num_kept", ir.DataType.INT64, ir.Shape([batch]))
        graph.inputs.append(num_kept)
        functions.append(kept_counts_function(opset=opset))
        counted = op.Where(op.Less(places, op.Unsqueeze(num_kept, [1])), kept_indices, -1)
        kept_counts = op.KeptCounts(features, token_mask, counted, **ours)
        outputs.append((kept_counts, "kept_counts", ir.DataType.INT64, [batch, k]))
    for value, name, dtype, shape in outputs:
        value.name = name
        value.dtype = dtype
        value.shape = ir.Shape(shape)
        graph.outputs.append(value)
    return functions
