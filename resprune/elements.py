"""The element types of graphs' inputs and outputs, once for all rooms; only the standard library is imported."""

from typing import NamedTuple


class Element(NamedTuple):
    """One row. `name` is the one in manifests, NumPy (which lacks bfloat16), PyTorch and TensorRT."""

    name: str
    onnx: int
    """Its number in ONNX's `TensorProto.DataType`."""
    nbytes: int
    """Of one number."""
    ort: str
    """What ONNX Runtime calls a tensor of it."""
    triton: str
    """What Triton calls it."""


ELEMENTS = {
    row.name: row
    for row in (
        Element("float32", 1, 4, "tensor(float)", "fp32"),
        Element("float16", 10, 2, "tensor(float16)", "fp16"),
        Element("bfloat16", 16, 2, "tensor(bfloat16)", "bf16"),
        Element("int64", 7, 8, "tensor(int64)", "i64"),
        Element("bool", 9, 1, "tensor(bool)", "i1"),
    )
}
FLOATS = ("float32", "float16", "bfloat16")
"""What visual tokens, weights that are not packed, and caches may be."""
BY_ONNX = {row.onnx: row for row in ELEMENTS.values()}
BY_ORT = {row.ort: row for row in ELEMENTS.values()}
