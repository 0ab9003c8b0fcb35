"""The workers of the speed tables on a model narrow and shallow: that they run, and that ours and theirs agree."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import bursts, decode, environments, llamacpp, measure, peers, speed
from benchmarks.measure import processes_take_turns
from benchmarks.shapes import CLIP_L_336, LLAMA_1B, LLAVA, Shape
from benchmarks.speed import Subject, figures, ours, prepare, worker
from resprune.runtime.cli import main

CLIP = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
SMALL = replace(
    LLAVA,
    name="small",
    vision={**CLIP_L_336, **CLIP, "image_size": 84},
    text={**LLAMA_1B, **LLAMA},
    picture=(84, 84),
    num_tokens=36,
)


@pytest.fixture(scope="module", autouse=True)
def quick(traced_once: None) -> Iterator[None]:
    """Exports share what they trace, all but one in this process; speed is not at stake, and nobody waits for it."""

    def exported(model: Path, bundle: Path, *options: str) -> Path:
        if "--optimize" in options:
            return measure.exported(model, bundle, *options)
        assert main(["export", str(model), str(bundle), *options]) == 0
        return bundle

    with pytest.MonkeyPatch.context() as patch:
        for module in (decode, speed):
            patch.setattr(module, "exported", exported)
        patch.setattr(bursts, "PAUSE_SECONDS", 0.0)
        yield


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    work = tmp_path_factory.mktemp("work")
    return prepare(SMALL, work, work / "bundles")


def test_ours_and_pytorch_go_the_same_way(subject: Subject) -> None:
    theirs = worker(
        "hugging_face",
        subject,
        checkpoint=str(subject.checkpoint),
        bundle=str(subject.bundle),
        attention="sdpa",
        dtype="float32",
        budgets=SMALL.budgets[:1],
    )
    replies = processes_take_turns({"ours": ours(subject), "theirs": theirs}, rounds=2)
    own, other = (figures(replies[name]) for name in ("ours", "theirs"))
    assert set(own) == {"4", "8", "12", "all"}
    assert set(other) == {"4", "all"}
    for case, found in other.items():
        assert found["prompt tokens"] == own[case]["prompt tokens"]
        assert len(found["first token, samples"]) == len(own[case]["first token, samples"]) == 2
        assert found["stages"].keys() == own[case]["stages"].keys()
        assert found["stages"].keys() == {"pixels", "encode", "prompt", "select", "prefill"}
    assert own["all"]["prompt tokens"] - own["4"]["prompt tokens"] == 32
    assert own["4"]["cache bytes"] == own["4"]["prompt tokens"] * 2 * 2 * 64 * 4


def test_decoding_without_a_peer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime-genai is not among the tests' packages: its faults stand beside our own figures."""
    monkeypatch.delitem(decode.BUNDLES["fp32"], "fp32, --optimize ort")
    monkeypatch.setattr(environments, "environment", lambda *arguments: Path(sys.executable))
    monkeypatch.setattr(environments, "genai_model", lambda python, model, folder, precision: folder)
    result = decode.run(tmp_path, SMALL, processes=2)
    short, long = result["prompt tokens"].values()
    assert long - short == 32
    assert "onnxruntime_genai" in result["engines"]["onnxruntime-genai, int4"]["fault"]
    for name in ("fp32", "q4, --optimize ort"):
        for case in ("4", "all"):
            found = result["engines"][f"resprune, {name}"][case]
            assert len(found["of each prompt"]) == found["tokens per second"].repeats == 2 * decode.PROMPTS
            assert 10 < found["resident megabytes"] < 300, "PyTorch would be there too"
            assert "of theirs" not in found
    text = decode.table(result)
    assert f"| resprune, fp32 | {short} |" in text
    assert "| onnxruntime-genai, fp32 | ModuleNotFoundError" in text


def test_a_decoders_memory_has_no_pytorch_in_it() -> None:
    check = "import sys, benchmarks.decoder; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_without_llama_cpp_its_fault_stands_beside_our_figures(
    tiny_bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tests/hosts has the real one."""
    monkeypatch.setattr(llamacpp, "PROMPTS", 1)
    own = {"bundle": str(tiny_bundle("clip-llama", k=7, split=True))}
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    theirs = own | {"gguf": str(file), "packages": str(tmp_path)}
    result = llamacpp.compare({llamacpp.BASE: own, "llama.cpp, Q4_1": theirs}, processes=1)
    short, _ = result["prompt tokens"].values()
    text = llamacpp.table(result)
    assert f"| {llamacpp.BASE} | {short} | " in text
    assert "| llama.cpp, Q4_1 | – | resprune.runtime.errors.ResPruneError: --gguf needs" in text
    assert result["engines"][llamacpp.BASE]["all"]["prefill"].median > 0


def test_beside_openvino_the_losses_of_our_own_are_told(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without OpenVINO: its faults stand beside our own figures."""

    def prepared(shape: Shape, work: Path, bundles: Path, *options: str) -> Subject:
        return prepare(shape, work, bundles, *options) if "int8" in options else subject

    def model(python: Path, checkpoint: Path, folder: Path, weights: str) -> Path:
        if weights == "int4":
            raise environments.UnavailableError("optimum-intel could not export the checkpoint: no int4")
        return folder

    monkeypatch.delitem(peers.BUNDLES, "preset cpu")
    monkeypatch.setattr(peers, "prepare", prepared)
    monkeypatch.setattr(peers, "RESULTS", tmp_path)
    monkeypatch.setattr(environments, "environment", lambda *arguments, **options: Path(sys.executable))
    monkeypatch.setattr(environments, "openvino_model", model)
    result = peers.run(tmp_path, [SMALL], rounds=1)
    (shape,) = result.values()
    assert shape["lost"]["fp32"]["logits"]["max_diff"] < 1e-4 < shape["lost"]["int8"]["logits"]["max_diff"]
    assert "openvino" in shape["engines"]["OpenVINO GenAI, int8 weights, bf16"]["fault"]
    assert shape["bytes"]["resprune, int8"] < shape["bytes"]["resprune, fp32"]
    text = peers.table(result)
    assert "int8: image_features by 0.0" in text
    assert "| resprune, int8 | all | " in text
    assert "int4 weights, bf16 | – | optimum-intel could not export the checkpoint: no int4" in text
    # A family that they do not prune is compared with their prompt of all tokens.
    theirs = "OpenVINO GenAI, int8 weights, bf16"
    shape["engines"][theirs] = {"all": shape["engines"]["resprune, int8"]["all"]}
    shape["bytes"][theirs] = 1
    lines = [line for line in peers.table(result).splitlines() if line.startswith("| resprune, int8")]
    assert len(lines) == 4
    assert all(line.split(" | ")[7] != "–" for line in lines)
    peers.draw(result)
    assert (tmp_path / "openvino.png").exists()
