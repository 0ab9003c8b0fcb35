"""ONNX Runtime in a child process."""

import io
import pickle
import signal
import subprocess
import sys

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper

from resprune.exporter.verify.ort_worker import OrtWorker
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


CTRL_C = """
import os, signal, sys
import numpy as np
from resprune.exporter.verify.ort_worker import OrtWorker
signal.signal(signal.SIGINT, lambda *_: None)  # and not SIG_IGN, which a child would inherit
with OrtWorker() as worker:
    os.killpg(0, signal.SIGINT)  # while it imports
    graph = sys.argv[1]
    print(*worker.run(graph, {"x": np.ones(1, np.float32)})["y"])
    os.killpg(0, signal.SIGINT)
    print(*worker.run(graph, {"x": np.ones(1, np.float32)})["y"])
"""


def test_ctrl_c_is_not_for_it(doubling):
    """The terminal sends it to every process of the group in front."""
    command = [sys.executable, "-c", CTRL_C, str(doubling)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, start_new_session=True)
    assert (done.stdout, done.stderr) == ("2.0\n2.0\n", "")


KILLED = """
import os, pickle, signal, sys
from resprune.exporter.verify.ort_worker import OrtWorker
with OrtWorker() as worker:
    if sys.argv[1] == "waited for":
        pickle.dump(("run", "missing.onnx", {}), worker._process.stdin)
        worker._process.stdin.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("answer", ["not asked for", "waited for"])
def test_it_ends_without_a_word_when_the_exporter_is_killed(answer):
    killed = subprocess.Popen([sys.executable, "-c", KILLED, answer], stderr=subprocess.PIPE)
    _, said = killed.communicate(timeout=60)  # until no process has this end any more
    assert (killed.returncode, said) == (-signal.SIGKILL, b"")


ORPHANED = """
import os, signal, sys
from resprune.exporter.verify.ort_worker import OrtWorker
with OrtWorker() as worker:
    try:
        worker.run("missing.onnx", {})
    except RuntimeError:
        print(worker._process.pid, flush=True)  # it is up
    os.kill(worker._process.pid, signal.SIGSTOP)  # so it reads and writes nothing any more
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child at once")
def test_it_ends_at_once_when_the_exporter_is_killed():
    killed = subprocess.run([sys.executable, "-c", ORPHANED], stdout=subprocess.PIPE, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    child = psutil.Process(int(killed.stdout)) if psutil.pid_exists(int(killed.stdout)) else None
    assert child is None or child.wait(timeout=10) is None or not child.is_running()


def test_it_is_light():
    code = (
        "import sys, resprune.exporter.verify.ort_worker; print({'torch', 'transformers'} & set(sys.modules))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told == "set()\n"
