"""The TensorRT plugin up to where TensorRT's libraries begin: `tensorrt_core` says what is NVIDIA's and what is not."""

import json
import re

import onnx
import pytest
import torch

from resprune.exporter.verify.reference import residual_select
from resprune.graphs import token_select_model
from resprune.graphs.kernels.compiled import SHARED_MEMORY
from resprune.graphs.kernels.selection import scratch_words
from resprune.graphs.kernels.tensorrt_plugin import for_plugin, register
from resprune.method import Selection
from tests.graphs.kernels.build_plugin import HIDDEN, PROCESSORS, SIZES, K
from tests.graphs.kernels.interpreted import features, gains, shapes_of, together


@pytest.fixture(scope="module")
def plugin(without_interpreter):
    return json.loads((without_interpreter("build_plugin") / "plugin.json").read_text())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_outputs(plugin, dtype):
    described = plugin[dtype]
    assert described["output_types"] == ["INT64", "FLOAT"]
    pictures, tokens = [size["B"] for size in SIZES], [size["N"] for size in SIZES]
    words = [scratch_words(n, K) for n in tokens]
    assert described["output_shapes"] == [[pictures, [K] * len(SIZES)], [pictures, words]]
    visual = "FLOAT" if dtype == "float32" else "HALF"
    kinds = [visual, "FLOAT", "BOOL", "INT64", "FLOAT"]
    assert described["supported"] == [[kind, "LINEAR"] for kind in kinds]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_launch(plugin, dtype):
    """Programs of all pictures fit on the GPU at once, as long as there are fewer pictures than multiprocessors."""
    launch = plugin[dtype]["launch"]
    pictures = [size["B"] for size in SIZES]
    assert launch["grid_x"] == [max(1, PROCESSORS // count) for count in pictures] == [3, 1, 1]
    assert launch["grid_y"] == pictures
    assert launch["grid_z"] == launch["block_y"] == launch["block_z"] == [1, 1, 1]
    ptx = plugin[dtype]["ptx"]
    assert {f".reqntid {threads}" in ptx for threads in launch["block_x"]} == {True}
    assert all(0 < size <= SHARED_MEMORY for size in launch["shared_mem"])
    assert plugin[dtype]["scalars"] == [
        ["INT32", [size["N"] for size in SIZES]],
        ["INT32", [0, 0, 0]],
        ["INT32", [K + 2] * 3],
    ]


def test_the_kernel_takes_inputs_then_scalars_then_outputs(plugin):
    for dtype in ("float32", "float16"):
        ptx, name = plugin[dtype]["ptx"], plugin[dtype]["kernel_name"]
        entry = re.search(rf"\.visible \.entry {name}\((.*?)\)", ptx, re.DOTALL)[1]
        assert re.findall(r"\.param \.(\w+)", entry) == ["u64"] * 3 + ["u32"] * 3 + ["u64"] * 2


@pytest.mark.parametrize(("index", "dtype"), [(0, "float32"), (1, "float16")])
def test_a_launch_with_just_these_arguments_picks_what_the_reference_picks(plugin, index, dtype):
    """Grid, scalars and shapes as the plugin gave them, the outputs uninitialised, all programs at the same time."""
    described = plugin[dtype]
    B, N = SIZES[index]["B"], SIZES[index]["N"]
    visual, gain = features(0, N, HIDDEN, getattr(torch, dtype), batch=B), gains(1, N, batch=B)
    scalars = [values[index] for _, values in described["scalars"]]
    picks, scratch = (
        torch.full([size[index] for size in shape], fill)
        for shape, fill in zip(described["output_shapes"], (-7, -7.5), strict=True)
    )
    launch = described["launch"]
    assert launch["grid_y"][index] == B
    values = [visual, gain, torch.ones(B, N, dtype=torch.bool), *scalars, picks, scratch]
    together(values, K, programs=launch["grid_x"][index], **shapes_of(visual, K))
    assert torch.equal(picks, residual_select(visual, gain, K))


def test_nodes_for_the_plugin_have_its_outputs_and_no_function():
    model = token_select_model(Selection(k=5))
    changed = for_plugin(model)
    node = next(node for node in changed.graph.node if node.op_type == "ResidualSelect")
    assert len(node.output) == 2
    names = [name for node in changed.graph.node for name in node.output]
    assert len(names) == len(set(names)), "a name twice"
    assert [function.name for function in changed.functions] == ["TextGain"]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert attributes == {"k": 5, "plugin_namespace": b"resprune"}
    assert len(next(node for node in model.graph.node if node.op_type == "ResidualSelect").output) == 1


def test_without_tensorrt_it_says_what_to_install():
    with pytest.raises(ImportError, match=r"tensorrt\.plugin, 10\.7 or later"):
        register(capability=90, processors=132)
