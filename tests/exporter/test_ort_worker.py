"""ONNX Runtime in a child process."""

import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from resprune.exporter.ort_worker import OrtWorker


@pytest.fixture
def doubling(tmp_path):
    """A graph y = x + x."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "doubling", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "doubling.onnx")
    return tmp_path / "doubling.onnx"


def test_it_runs_and_goes_on_after_a_failure(doubling, tmp_path):
    with OrtWorker() as worker:
        with pytest.raises(RuntimeError, match=r"run missing\.onnx"):
            worker.run(tmp_path / "missing.onnx", {})
        assert worker.run(doubling, {"x": np.array([1, 2], np.float32)})["y"].tolist() == [2, 4]
    assert worker._process.poll() is not None


def test_a_dead_child_is_an_error_and_no_hang(doubling):
    with OrtWorker() as worker:
        worker._process.kill()
        with pytest.raises(RuntimeError, match="ONNX Runtime's process died"):
            worker.run(doubling, {"x": np.zeros(1, np.float32)})


def test_it_is_light():
    code = "import sys, resprune.exporter.ort_worker; print({'torch', 'transformers'} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told == "set()\n"
