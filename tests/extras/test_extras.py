"""Every extra alone, in an environment of its own: each command's help, and one real run.

By `make test-extras`: it downloads what each extra needs. TensorRT's own libraries and llama.cpp's build are not tried:
the first are at NVIDIA's index only, the second takes a compiler many minutes.
"""

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

import pytest

from tests.hosts.serve import served

ROOT = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMMANDS = sorted(PROJECT["entry-points"]["resprune.commands"])
PICTURE = ROOT / "demo" / "pictures" / "shapes.png"
QUESTION = "What color is the large square?"
RUNS = {
    "export": ["export", "{demo}", "out", "-k", "16"],
    "eval": ["eval", "{bundle}", "--data", "easyvqa", "-k", "4", "--limit", "2", "--out", "report"],
    "openvino": ["ask", "{unrolled}", str(PICTURE), QUESTION, "--provider", "openvino,cpu"],
    "tensorrt-rtx": ["build", "{bundle}", "--target", "sm_86"],
    "building": ["ask", "{bundle}", str(PICTURE), QUESTION],
    "demo": ["ask", "{bundle}", str(PICTURE), QUESTION],
    "serve": ["inspect", "{bundle}"],  # and it serves
    "lmms": ["inspect", "{bundle}"],
    "kernels": ["ask", "{bundle}", str(PICTURE), QUESTION],
}
NOT_TRIED = {"test", "wheel", "lint", "docs", "tensorrt", "llamacpp"}
TORCH = {"export", "lmms", "kernels"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, by way of the sdist, so that nothing an earlier build left is in it."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", out, ROOT], check=True, capture_output=True)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def places(tiny_bundle: Callable[..., Path], demo_bundle: Path) -> dict[str, str]:
    """What RUNS name in braces."""
    unrolled = tiny_bundle("demo", k=16, body="unrolled")
    return {"bundle": str(demo_bundle), "unrolled": str(unrolled), "demo": str(ROOT / "demo" / "model")}


def test_every_extra_is_tried_or_named() -> None:
    assert set(PROJECT["optional-dependencies"]) <= set(RUNS) | NOT_TRIED


@pytest.mark.parametrize("extra", sorted(set(PROJECT["optional-dependencies"]) - NOT_TRIED))
def test_an_extra_alone(extra: str, wheel: Path, places: dict[str, str], tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    install = [environment / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-compile"]
    torch = ["torch==2.13.0"] if extra in TORCH else []
    constraint = ["--constraint", ROOT / "constraints.txt"]
    subprocess.run([*install, *constraint, *torch, f"{wheel}[{extra}]"], check=True, env=clean)

    def resprune(*words: str) -> subprocess.CompletedProcess[str]:
        command = [environment / "bin" / "resprune", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=clean)

    for command in COMMANDS:
        done = resprune(command, "--help")
        assert done.returncode == 0, done.stderr
    if extra == "serve":
        with served(places["bundle"], resprune=[str(environment / "bin" / "resprune")]) as url:
            for path in ("/", "/metrics", "/v1/models"):
                with urlopen(f"{url}{path}") as answer:
                    assert answer.read()
    done = resprune(*(word.format(**places) for word in RUNS[extra]))
    # On a CPU that is not Intel's the plug-in is found, and has no device.
    no_device = extra == "openvino" and "openvino finds no device here" in done.stderr
    assert done.returncode == (2 if no_device else 0), done.stderr
