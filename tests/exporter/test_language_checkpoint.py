"""The language model by itself: transformers loads it, and it computes what it computes inside the whole model."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from resprune.exporter.checkpoint import language_checkpoint as module
from resprune.exporter.checkpoint.checkpoint import Checkpoint, resolve
from resprune.exporter.checkpoint.language_checkpoint import LanguageCheckpoint, language_checkpoint
from resprune.exporter.checkpoint.shards import open_weights
from resprune.exporter.checkpoint.weightless import fake_mode
from resprune.exporter.export import export
from resprune.exporter.families import split_model
from resprune.exporter.options import Options
from resprune.exporter.trace.weights import find_weights
from resprune.runtime.bundle.files import read_bundle
from resprune.runtime.cli import main
from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.language_models import LANGUAGE_MODELS
from tests.tiny_qwen import VARIANTS, write_checkpoint

# Llama, Mistral and Qwen2; tied heads; shards; bfloat16 and float16; names of transformers 4.
LLAVAS = (
    "clip-llama",
    "siglip-mistral",
    "dinov2-qwen2",
    "clip-list",
    "next-llama",
    "next-mistral",
    "next-qwen2",
)


def planned(checkpoint: Checkpoint) -> LanguageCheckpoint:
    components = split_model(checkpoint, torch.float32, fake_mode())
    return language_checkpoint(components.model, find_weights(checkpoint, components.model))


@pytest.mark.parametrize("variant", LLAVAS)
@pytest.mark.parametrize("shard_bytes", [module.SHARD_BYTES, 30_000])
def test_it_computes_what_it_does_inside(
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variant: str,
    shard_bytes: int,
) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", shard_bytes)
    root, out = tiny_checkpoint(variant), tmp_path / "language_model"
    counted: list[int] = []
    language = planned(resolve(str(root)))
    language.write(out, root, counted.append)
    assert sum(counted) == language.nbytes
    assert (out / "model.safetensors").exists() == (shard_bytes > language.nbytes)
    alone: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    whole: Any = AutoModelForImageTextToText.from_pretrained(root, dtype=torch.float32).eval()
    assert type(alone).__name__ in [row.causal_class for row in LANGUAGE_MODELS.values()]
    embeds = torch.randn(2, 30, alone.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        inside = whole.lm_head(whole.model.language_model(inputs_embeds=embeds).last_hidden_state)
        assert torch.equal(alone(inputs_embeds=embeds).logits, inside)
        ids = torch.tensor([[1, 300, 301]])
        assert torch.equal(alone.get_input_embeddings()(ids), whole.get_input_embeddings()(ids))
    assert AutoTokenizer.from_pretrained(out)("a small red circle").input_ids


@pytest.mark.parametrize("variant", ["siglip-mistral", "clip-list"])
def test_weights_are_copied_as_they_are(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, variant: str
) -> None:
    root, out = tiny_checkpoint(variant), tmp_path / "language_model"
    language = planned(resolve(str(root)))
    language.write(out, root)
    written = open_weights(out)
    assert written.keys() == language.weights.keys()
    for name, tensor in language.weights.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name].read(), tensor.read())
    assert AutoConfig.from_pretrained(out).dtype == tensor.dtype != torch.float32


def test_the_config_says_the_rope_in_old_words_too(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """transformers 4, which TensorRT-LLM is pinned to, takes 10,000 for a theta that it does not find."""
    planned(resolve(str(tiny_checkpoint("dinov2-qwen2")))).write(tmp_path / "out", tmp_path)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["rope_scaling"] is None
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    scaled = planned(resolve(str(tiny_checkpoint("clip-llama")))).config
    scaled.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    plain = module.plain_config(scaled, "float16")
    assert (plain["rope_theta"], plain["rope_scaling"]) == (5e5, {"rope_type": "linear", "factor": 2.0})


def test_a_language_model_without_a_class_of_its_own_is_refused(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "qwen25", VARIANTS["qwen25"])
    with pytest.raises(
        ResPruneError, match=r"qwen2_5_vl_text has no class of its own: TensorRT-LLM and SGLang take"
    ):
        export(str(root), tmp_path / "out", Options(k=4, language_checkpoint=True), report=lambda line: None)
    assert not (tmp_path / "out").exists()


def test_proportional_attention_is_refused(tmp_path: Path) -> None:
    options = Options(k=4, language_checkpoint=True, attention="proportional")
    with pytest.raises(ResPruneError, match="for runtimes that attend to every row alike"):
        export("demo", tmp_path / "out", options)


def test_export_for_trtllm_puts_it_into_the_bundle(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    words = ["export", str(tiny_checkpoint("clip-llama")), str(out), "-k", "7", "--for", "trtllm"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.findall(r"^\[(\d)/8\]", "\n".join(lines), flags=re.MULTILINE) == list("12345678")
    assert any("language_model" in line and line.endswith("LlamaForCausalLM") for line in lines)
    names = {name for name in read_bundle(out).manifest.files if name.startswith("language_model/")}
    inside = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {f"language_model/{name}" for name in inside} <= names
    assert AutoModelForCausalLM.from_pretrained(out / "language_model").config.hidden_size == 48
