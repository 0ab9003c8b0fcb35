"""The README's commands and its Python do what it says, on a copy of the demo in an empty directory."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A working directory in which the README's relative paths lead to the demo."""
    work = tmp_path_factory.mktemp("readme")
    (work / "demo").symlink_to(ROOT / "demo")
    return work


def run(command, directory):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command, cwd=directory, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )


def make_demo():
    """What `make demo`, the README's first command, runs once its environment is there."""
    settings = [f"BIN={Path(sys.executable).parent}", "--old-file=.venv/with-export"]
    done = run(["make", "--dry-run", "--directory", ROOT, *settings, "demo"], ROOT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith("make")]


def test_commands_then_python(directory):
    commands = make_demo() + [line for block in blocks("sh") for line in block.splitlines()]
    assert commands
    for command in commands:
        done = run(["bash", "-c", command], directory)
        assert done.returncode == 0, f"{command}: {done.stderr}"
    programs = blocks("python")
    assert programs
    for program in programs:
        done = run([sys.executable, "-c", program], directory)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


def test_the_comparison_on_a_gpu_is_a_command_that_polygraphy_takes(directory):
    """It needs a GPU to run; here polygraphy reads it, and writes the script that it would run."""
    (command,) = re.findall(
        r"^(POLYGRAPHY_USE_TENSORRT_RTX=1 polygraphy run .*)$", README, flags=re.MULTILINE
    )
    done = run(["bash", "-c", f"{command} --gen-script comparison.py"], directory)
    assert done.returncode == 0, done.stderr
    script = (directory / "comparison.py").read_text()
    assert "TrtRunner" in script
    for path in re.findall(r"build/[\w./-]+", command):
        assert path in script
        assert "sm_86" not in path or (directory / path).exists(), "resprune build above makes it"


def test_make_targets_exist():
    targets = set(re.findall(r"\bmake ([a-z-]+)", README))
    made = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert targets <= made
    assert {"demo", "test", "bench", "export"} <= targets


def test_files_that_are_named_exist():
    named = re.findall(r"`((?:demo|benchmarks|exporter|graphs|runtime|tests)/[\w./-]+)`", README)
    assert [name for name in named if not (ROOT / name).exists()] == []
