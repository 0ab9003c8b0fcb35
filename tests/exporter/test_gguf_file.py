"""The language model in GGUF, read back: every weight, the tokenizer, and bundles without a decoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from resprune.exporter.checkpoint.gguf_file import TYPES, GgufModel, _rotary_factors, gguf_model
from resprune.exporter.checkpoint.shards import StoredTensor
from resprune.exporter.export import export
from resprune.exporter.options import Options
from resprune.runtime.bundle.files import read_bundle
from resprune.runtime.cli import main
from resprune.runtime.errors import ResPruneError
from resprune.runtime.pipeline import Pipeline
from tests.runtime.bundles import one_sentence

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Callable[..., Path]) -> Path:
    """The demo without its decoder, and its language model in F32 beside."""
    return tiny_bundle("demo", k=16, gguf="f32", decoder=False)


@pytest.fixture(scope="module")
def file(bundle: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(bundle / "language_model.gguf")


def test_every_weight_is_the_checkpoints(file: gguf.GGUFReader) -> None:
    model = ROOT / "demo" / "model"
    stored = {name: value for part in model.glob("*.safetensors") for name, value in load_file(part).items()}
    inside = {
        name.split("language_model.")[-1].removeprefix("model."): value for name, value in stored.items()
    }
    written = {tensor.name: np.asarray(tensor.data) for tensor in file.tensors}
    values: dict[str, Any] = {name: value.float().numpy() for name, value in inside.items()}
    np.testing.assert_array_equal(written["token_embd.weight"], values["embed_tokens.weight"])
    np.testing.assert_array_equal(written["blk.0.attn_v.weight"], values["layers.0.self_attn.v_proj.weight"])
    # Rotary pairs lie half a head apart in transformers, side by side in llama.cpp.
    found, query = written["blk.0.attn_q.weight"], values["layers.0.self_attn.q_proj.weight"]
    heads = int(file.get_field("llama.attention.head_count").contents())
    apart, beside = query.reshape(heads, 2, -1, query.shape[1]), found.reshape(heads, -1, 2, query.shape[1])
    np.testing.assert_array_equal(beside[:, :, 0], apart[:, 0])
    np.testing.assert_array_equal(beside[:, :, 1], apart[:, 1])
    layers = int(file.get_field("llama.block_count").contents())
    assert len(written) == 9 * layers + 2 + ("output.weight" in written)


def test_the_vocabulary_is_the_tokenizers(file: gguf.GGUFReader, bundle: Path) -> None:
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    texts = file.get_field("tokenizer.ggml.tokens").contents()
    assert len(texts) == next(t for t in file.tensors if t.name == "token_embd.weight").shape[1]
    for text, number in tokenizer.get_vocab().items():
        assert texts[number] == text
    assert (
        file.get_field("tokenizer.chat_template").contents() == (bundle / "chat_template.jinja").read_text()
    )
    assert texts[file.get_field("tokenizer.ggml.eos_token_id").contents()] == "</s>"


def test_a_bundle_without_a_decoder_says_so(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = read_bundle(bundle).manifest
    assert sorted(manifest.graphs) == ["embed_tokens", "vision_select"]
    assert not manifest.has_decoder
    assert manifest.parity["level"] == "without decoder"
    assert manifest.parity["picks"].split("/")[0] == manifest.parity["picks"].split("/")[1]
    assert manifest.parity["outputs"].keys() == {"embed_tokens", "vision_select"}
    assert not list(bundle.glob("**/decoder*"))
    assert main(["inspect", str(bundle)]) == 0
    assert "none: a GGUF file" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["ask", "bench", "chat", "serve"])
def test_whoever_needs_the_decoder_is_told_the_way_out(
    command: str, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = str(ROOT / "demo" / "pictures" / "shapes.png")
    words = {
        "ask": [str(bundle), picture, "what?"],
        "bench": [str(bundle)],
        "chat": [str(bundle), picture],
        "serve": [str(bundle), "--port", "0"],
    }
    assert main([command, *words[command]]) == 2
    *before, last = capsys.readouterr().err.splitlines()
    assert f"answer with --gguf {bundle / 'language_model.gguf'} or --server URL" in last
    assert all("checking and opening" in line for line in before)  # what `serve` does meanwhile


@pytest.mark.parametrize("command", [["eval", "--data", "scenes"], ["lmms", "--tasks", "resprune_scenes"]])
def test_whoever_evaluates_it_is_told_to_export_it_again(
    command: list[str], bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([*command, str(bundle), "-k", "8", "--limit", "1", "--out", str(out)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("; for anything else export it again with one")
    assert not out.exists()


def test_what_it_selects_is_what_the_whole_bundle_selects(bundle: Path, demo_bundle: Path) -> None:
    class ToldError(Exception):
        pass

    kept: list[Any] = []

    def generator(*_: Any) -> Any:
        def start(request: Any, sampling: Any) -> Any:
            kept.append(request)
            raise ToldError

        return SimpleNamespace(start=start, close=lambda: None)

    for root in (bundle, demo_bundle):
        with Pipeline.load(root, threads=1, generator=generator) as pipeline, pytest.raises(ToldError):
            pipeline.ask(ROOT / "demo" / "pictures" / "shapes.png", "What color is the large square?")
    one, other = kept
    np.testing.assert_array_equal(one.spliced.inputs_embeds, other.spliced.inputs_embeds)
    np.testing.assert_array_equal(one.images[0][0].picks.kept_indices, other.images[0][0].picks.kept_indices)


def stored(path: Path, values: torch.Tensor) -> StoredTensor:
    path.write_bytes(values.numpy().tobytes())
    return StoredTensor(path, values.dtype, tuple(values.shape), 0, path.stat().st_size)


def test_rows_that_make_no_blocks_are_fp16(tmp_path: Path) -> None:
    model = GgufModel(SimpleNamespace(), {}, "q8_0", 0)
    whole, odd, vector = (
        stored(tmp_path / str(number), torch.zeros(shape))
        for number, shape in enumerate([(2, 64), (2, 48), (48,)])
    )
    kinds = [model._type("x", tensor) for tensor in (whole, odd, vector)]
    assert kinds == [TYPES["q8_0"], TYPES["f16"], TYPES["f32"]]


def test_llama_3_turns_slow_frequencies_slower() -> None:
    """As `_compute_llama3_parameters` of transformers."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, rope_parameters=rope)
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / rope["rope_theta"] ** (np.arange(0, 128, 2) / 128)
    (factors,) = _rotary_factors(config).values()
    np.testing.assert_allclose(plain / factors, wanted.numpy(), rtol=1e-5)


def test_what_llama_cpp_would_compute_otherwise_is_refused(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(
        ResPruneError, match="attends to all tokens where this model attends to the last 12"
    ) as caught:
        export(str(tiny_checkpoint("siglip-mistral")), tmp_path / "out", Options(k=7, gguf="f16"))
    one_sentence(caught.value)
    assert not (tmp_path / "out").exists()
    unknown = SimpleNamespace(config=SimpleNamespace(text_config=SimpleNamespace(model_type="gemma3_text")))
    with pytest.raises(ResPruneError, match="no GGUF architecture for the language model gemma3_text"):
        gguf_model(unknown, {}, "f16", 0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gguf-type", "f32"], "--gguf-type is for --for gguf"),
        (["--without-decoder", "--optimize", "ort"], "optimize is of the decoder"),
        (["--for", "gguf", "--attention", "proportional"], "attend to every row alike"),
    ],
)
def test_options_that_contradict_are_one_line(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "demo", str(tmp_path / "out"), "-k", "16", *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
