"""What the comparison of weights lets pass and what not; test_verify_layers.py has it within an export."""

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from resprune.exporter.checkpoint.shards import StoredTensor
from resprune.exporter.trace.blocks import FITS, Blocks
from resprune.exporter.trace.quantize import int8_scales
from resprune.exporter.verify.weights import ROUNDED, Comparison


def test_bits_are_compared_after_the_cast_whatever_they_are(tmp_path):
    """A NaN equals itself, a zero not its negative; a weight that the checkpoint lacks or that is cut off differs."""
    source = torch.randn(600, 530, generator=torch.Generator().manual_seed(0))  # no multiple of a tile
    source[3, 5], source[599, 529] = float("nan"), 0.0
    (tmp_path / "source").write_bytes(source.numpy().tobytes())
    stored = {"weight": StoredTensor(tmp_path / "source", torch.float32, (600, 530), 0, source.nbytes)}
    written = source.half().t().contiguous()
    length = written.nbytes

    def differing(name: str) -> list[str]:
        (tmp_path / "data").write_bytes(written.numpy().tobytes())
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT16, dims=(530, 600))
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "data"), ("offset", 0), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        graph = helper.make_graph([], "graph", [], [], [tensor])
        onnx.save(helper.make_model(graph), tmp_path / "graph.onnx")
        with Comparison(tmp_path / "graph.onnx", stored) as comparison:
            comparison.advance((tmp_path / "data").stat().st_size)
            return comparison.finish()[0]

    assert differing("weight.T") == []
    assert differing("unknown.T") == ["unknown.T"]
    assert differing("weight") == ["weight"], "of another shape"
    written[529, 599] = -0.0
    assert differing("weight.T") == ["weight.T"]
    written = written[:-1]
    assert differing("weight.T") == ["weight.T"]


@pytest.mark.parametrize("fit", ["int8", "q8", *FITS])
@pytest.mark.parametrize("width", [70, 96])
def test_a_quantized_number_that_is_off_by_one_shows(fit: str, width: int):
    weight = torch.randn(40, width, generator=torch.Generator().manual_seed(1))
    weight[5], weight[6] = 0, 1e-9
    if fit == "int8":
        form, scales = "int8", int8_scales(weight)
        packed = ((weight.t() / scales).round().to(torch.int8), scales)
        place, one = (11, 7), 1
    else:
        form = "q8" if fit == "q8" else "q4"
        packed = Blocks(8, 32).pack(weight)[:2] if fit == "q8" else Blocks(4, 32, fit).pack(weight)
        place, one = (7, 1, 3), 1 if fit == "q8" else 0x10
    assert ROUNDED[form](*packed, weight)
    numbers = packed[0]
    numbers[place] += one if numbers[place] < 100 else -one
    assert not ROUNDED[form](*packed, weight)
