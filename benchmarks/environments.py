"""Virtual environments of peers and hosts: their packages must not touch the project's own."""

from __future__ import annotations

import subprocess
import venv
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent


class UnavailableError(Exception):
    """A peer that cannot be installed or cannot take the model; the text is one sentence."""


def environment(peer: str, work: Path, *, described: Path = HERE) -> Path:
    """The Python of the environment that `requirements-<peer>.txt` in `described` lists, made if it is not there.

    It lies in `work`. Raises `UnavailableError`.
    """
    requirements = described / f"requirements-{peer}.txt"
    folder = (work / f"venv-{peer}").resolve()
    python = folder / "bin" / "python"
    mark = folder / "installed.txt"
    if mark.exists() and mark.read_text() == requirements.read_text():
        return python
    venv.create(folder, with_pip=True, clear=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps"]
    checked([*install, "--requirement", str(requirements)], f"{peer} could not be installed")
    mark.write_text(requirements.read_text())
    return python


def checked(command: Sequence[str], fault: str) -> None:
    """Run a command; `UnavailableError` with `fault` and the last line of what it said if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        raise UnavailableError(f"{fault}: {said[-1]}")


def openvino_model(python: Path, checkpoint: Path, folder: Path, weights: str) -> Path:
    """`checkpoint` as OpenVINO GenAI takes it, by optimum-intel; `weights` is its word for them: fp32, int8, int4."""
    return _by_optimum(python, checkpoint, folder, weights, "image-text-to-text")


def openvino_text_model(python: Path, checkpoint: Path, folder: Path, weights: str, *options: str) -> Path:
    """The same of a language model, without its tokenizer."""
    return _by_optimum(
        python,
        checkpoint,
        folder,
        weights,
        "text-generation-with-past",
        "--disable-convert-tokenizer",
        *options,
    )


def _by_optimum(python: Path, checkpoint: Path, folder: Path, weights: str, task: str, *options: str) -> Path:
    command = [str(python.with_name("optimum-cli")), "export", "openvino", "--weight-format", weights]
    command += ["--task", task, "--model", str(checkpoint), *options, str(folder)]
    checked(command, "optimum-intel could not export the checkpoint")
    return folder


def genai_model(python: Path, checkpoint: Path, folder: Path, precision: str) -> Path:
    """The language model `checkpoint` as onnxruntime-genai's own builder makes it for the CPU."""
    command = [str(python), "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint)]
    command += ["-o", str(folder), "-p", precision, "-e", "cpu", "-c", str(folder.with_name("cache"))]
    checked(command, "onnxruntime-genai's builder could not take the language model")
    return folder
