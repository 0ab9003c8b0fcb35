"""ONNX Runtime in a child process."""

import io
import pickle
import signal
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from resprune.exporter.ort_worker import OrtWorker
from resprune.runtime.errors import ResPruneError


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
        worker._process.terminate()
        with pytest.raises(RuntimeError, match=r"ONNX Runtime's process died \(exit status -15\)"):
            worker.run(doubling, {"x": np.zeros(1, np.float32)})


def test_a_killed_child_wanted_memory(doubling):
    with OrtWorker() as worker:
        worker._process.kill()
        with pytest.raises(
            ResPruneError, match=r"killed, most likely for want of memory; .* --verify layers"
        ):
            worker.run(doubling, {"x": np.zeros(1, np.float32)})


def test_an_answer_that_is_cut_off_is_a_death_too(doubling, monkeypatch):
    with OrtWorker() as worker:
        cut = pickle.dumps((None, {"y": np.zeros(9)}))[:40]
        worker._process.kill()
        with monkeypatch.context() as patch:
            patch.setattr(worker._process, "stdin", io.BytesIO())
            patch.setattr(worker._process, "stdout", io.BytesIO(cut))
            with pytest.raises(ResPruneError, match="ONNX Runtime's process was killed"):
                worker.run(doubling, {})


def test_ctrl_c_is_not_for_it(doubling, capfd):
    """The terminal sends it to every process that it runs."""
    with OrtWorker() as worker:
        worker.run(doubling, {"x": np.zeros(1, np.float32)})
        worker._process.send_signal(signal.SIGINT)
        assert worker.run(doubling, {"x": np.array([1], np.float32)})["y"].tolist() == [2]
    assert capfd.readouterr().err == ""


def test_it_is_light():
    code = "import sys, resprune.exporter.ort_worker; print({'torch', 'transformers'} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told == "set()\n"
