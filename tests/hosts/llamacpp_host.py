"""llama.cpp through llama-cpp-python, compiled from its pinned source: the library alone, in about two minutes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from tests.hosts.host import WORK, python_of

SOURCE = "llama-cpp-python==0.3.36"
OPTIONS = {
    "BUILD_SHARED_LIBS": "ON",
    "CMAKE_BUILD_TYPE": "Release",
    "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
    "CMAKE_INSTALL_RPATH": "$ORIGIN",
    "LLAMA_BUILD_COMMON": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_TOOLS": "OFF",
}


def packages() -> Path:
    """The folder that has `llama_cpp`, for the end of `sys.path`; one that cannot be made fails."""
    python = python_of("llamacpp")
    (folder,) = (python.parents[1] / "lib").glob("python*/site-packages")
    mark = folder / "llama_cpp" / "lib" / "made.txt"
    if not mark.exists() or mark.read_text() != SOURCE:
        _compile(python, folder / "llama_cpp" / "lib")
        mark.write_text(SOURCE)
    return folder


def use() -> None:
    """Make `llama_cpp` importable here, behind everything else."""
    folder = str(packages())
    if folder not in sys.path:
        sys.path.append(folder)


def _compile(python: Path, library: Path) -> None:
    work = WORK / "llamacpp"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    tools = {**os.environ, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}

    def run(*command: object) -> None:
        words = [str(word) for word in command]
        done = subprocess.run(words, env=tools, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"

    pip = (python, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", work, SOURCE)
    (archive,) = work.glob("*.tar.gz")
    with tarfile.open(archive) as source:
        source.extractall(work, filter="data")
    root = work / archive.name.removesuffix(".tar.gz")
    without = [f"--config-settings=cmake.define.{name}=OFF" for name in ("LLAMA_BUILD", "LLAVA_BUILD")]
    run(*pip, "install", "--no-deps", "--no-build-isolation", "--force-reinstall", *without, root)
    settings = [f"-D{name}={value}" for name, value in OPTIONS.items()]
    run("cmake", "-G", "Ninja", "-S", root / "vendor" / "llama.cpp", "-B", work / "made", *settings)
    run("cmake", "--build", work / "made", "--target", "llama", "--parallel", os.cpu_count() or 1)
    shutil.copytree(work / "made" / "bin", library, symlinks=True, dirs_exist_ok=True)
    shutil.rmtree(work)
