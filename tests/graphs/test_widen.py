"""The float32 stand-in for a bfloat16 graph: each product in float32, rounded where bfloat16 rounds."""

import onnxruntime as ort
import pytest
import torch
from onnx import ModelProto, TensorProto, helper

from resprune.graphs.widen import widen


def value(name: str, element_type: int, *shape: int) -> object:
    return helper.make_tensor_value_info(name, element_type, list(shape))


@pytest.fixture
def narrow() -> ModelProto:
    """(a · b) is an output and the input of a second product, as a layer's present key is."""
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], to=TensorProto.BFLOAT16),
        helper.make_node("MatMul", ["a", "b"], ["present"]),
        helper.make_node("Gemm", ["present", "c"], ["product"], transB=1),
        helper.make_node("Cast", ["product"], ["y"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "w"], ["z"]),
    ]
    c = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    raw = c.view(torch.uint8).numpy().tobytes()
    graph = helper.make_graph(
        nodes,
        "narrow",
        [
            value("x", TensorProto.FLOAT, 2, 4),
            value("b", TensorProto.BFLOAT16, 4, 5),
            value("w", TensorProto.FLOAT, 4, 1),
        ],
        [
            value("y", TensorProto.FLOAT, 2, 3),
            value("present", TensorProto.BFLOAT16, 2, 5),
            value("z", TensorProto.FLOAT, 2, 1),
        ],
        [helper.make_tensor("c", TensorProto.BFLOAT16, (3, 5), raw, raw=True)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def test_products_are_rounded_as_bfloat16(narrow: ModelProto) -> None:
    session = ort.InferenceSession(widen(narrow).SerializeToString(), providers=["CPUExecutionProvider"])
    assert [(put.name, put.type) for put in (*session.get_inputs(), *session.get_outputs())] == [
        (name, "tensor(float)") for name in ("x", "b", "w", "y", "present", "z")
    ]
    torch.manual_seed(0)
    x, b, w = torch.randn(2, 4), torch.randn(4, 5), torch.randn(4, 1)
    feeds = {"x": x.numpy(), "b": b.numpy(), "w": w.numpy()}
    y, present, z = (torch.from_numpy(array) for array in session.run(["y", "present", "z"], feeds))

    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(torch.bfloat16).float()

    c = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    first = rounded(rounded(x) @ rounded(b))
    torch.testing.assert_close(
        present, first, atol=0, rtol=2**-7
    )  # one rounding step, where the order of a sum tips it
    torch.testing.assert_close(y, rounded(present @ rounded(c).T), atol=0, rtol=2**-7)
    torch.testing.assert_close(z, x @ w)
    assert torch.equal(present, rounded(present))
    assert torch.equal(y, rounded(y))


def test_the_cpu_has_no_such_product(narrow: ModelProto) -> None:
    """Else the stand-in is no longer needed."""
    with pytest.raises(Exception, match="Could not find an implementation"):
        ort.InferenceSession(narrow.SerializeToString(), providers=["CPUExecutionProvider"])


def test_the_model_given_stays_as_it_was(narrow: ModelProto) -> None:
    before = narrow.SerializeToString(deterministic=True)
    widen(narrow)
    assert narrow.SerializeToString(deterministic=True) == before
