"""ONNX Runtime's telemetry stays off: nothing is written under the home directory, and no socket is opened."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ASK = """
from tests.hostile.guard import forbid_sockets
forbid_sockets()
import time
from PIL import Image
from resprune import Pipeline
with Pipeline.load({bundle!r}) as pipeline:
    print(pipeline.ask(Image.new("RGB", (40, 40)), "what is it?", max_new_tokens=2).token_ids)
    time.sleep(1)
"""
WORKER = """
from tests.hostile.guard import forbid_sockets
forbid_sockets()
import numpy as np
from pathlib import Path
from resprune.exporter.verify.ort_worker import OrtWorker
with OrtWorker() as worker:
    print(worker.run(Path({graph!r}), {{"input_ids": np.zeros((1, 3), np.int64)}}).keys())
"""


def run(program: str, home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    caches = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
    caches.pop("ORT_DISABLE_TELEMETRY", None)
    environment = caches | {"HOME": str(home)} | more
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.parametrize("program", [ASK, WORKER], ids=["runtime", "exporter"])
def test_no_file_and_no_socket(program: str, tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    bundle = tiny_bundle("clip-llama", k=7, split=True)
    program = program.format(bundle=str(bundle), graph=str(bundle / "onnx" / "embed_tokens.onnx"))
    done = run(program, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.rglob("*")) == []
    if Path("/proc/self").exists():  # where not even root can write
        assert run(program, Path("/proc")).returncode == 0


@pytest.mark.parametrize(("set_to", "found"), [(None, "1"), ("0", "0")])
def test_who_sets_the_variable_decides(set_to: str | None, found: str, tmp_path: Path) -> None:
    program = (
        "import resprune, ctypes; from resprune import Pipeline; getenv = ctypes.CDLL(None).getenv; "
        "getenv.restype = ctypes.c_char_p; print(getenv(b'ORT_DISABLE_TELEMETRY').decode())"
    )
    done = run(program, tmp_path, **({} if set_to is None else {"ORT_DISABLE_TELEMETRY": set_to}))
    assert (done.stdout, done.stderr) == (f"{found}\n", "")


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6"])
def test_the_guard_ends_a_process_that_opens_a_socket(family: str, tmp_path: Path) -> None:
    program = (
        "from tests.hostile.guard import forbid_sockets; forbid_sockets(); import ctypes, socket; "
        f"ctypes.CDLL(None).socket(int(socket.{family}), 1, 0); print('alive')"
    )
    done = run(program, tmp_path)
    assert "alive" not in done.stdout
    assert done.returncode == -31
