"""What must be compiled is compiled in child processes: this one interprets Triton."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def without_interpreter(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Name of a script beside this file → the directory it wrote its results to; its first argument."""
    cache = tmp_path_factory.mktemp("triton_cache")

    def run(script: str) -> Path:
        out = tmp_path_factory.mktemp(script)
        environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"}
        command = [sys.executable, "-m", f"tests.graphs.kernels.{script}", str(out)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return out

    return run
