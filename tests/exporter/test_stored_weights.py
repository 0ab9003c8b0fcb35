"""Of weights that stand in a folder twice, or are tied by the config alone, those that transformers takes."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from resprune.exporter.checkpoint.shards import open_weights, passed_over
from resprune.exporter.export import export
from resprune.exporter.options import Options
from resprune.runtime.bundle.files import read_bundle
from resprune.runtime.cli import main
from resprune.runtime.errors import ResPruneError
from resprune.runtime.pipeline import Pipeline
from tests import tiny
from tests.exporter.hugging_face import HuggingFace
from tests.exporter.hugging_face_qwen import HuggingFaceQwen
from tests.runtime.pipelines import QUESTION

PICTURE = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)


@pytest.fixture
def saved_again(tmp_path: Path) -> Path:
    """A sharded checkpoint, into whose folder a fine-tuned model was saved as one file; its shards are kept beside."""
    root = tiny.write_checkpoint(tmp_path / "model", tiny.Tiny(shards=3))
    shutil.copytree(root, tmp_path / "shards")
    model = AutoModelForImageTextToText.from_pretrained(root)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    model.save_pretrained(root)
    return root


def head(root: Path) -> Tensor:
    """As `open_weights` finds it, under its name of whichever age."""
    (found,) = (tensor for name, tensor in open_weights(root).items() if name.endswith("lm_head.weight"))
    return found.read()


def test_one_file_goes_before_a_stale_index(saved_again, tmp_path):
    assert (saved_again / "model.safetensors.index.json").exists(), "shows nothing"
    loaded = AutoModelForImageTextToText.from_pretrained(saved_again)
    assert torch.equal(head(saved_again), loaded.lm_head.weight)
    assert passed_over(saved_again) is None


def test_old_shards_beside_a_new_file_are_named(saved_again, tmp_path):
    for shard in (tmp_path / "shards").glob("model-*"):
        shutil.copy(shard, saved_again)
    loaded = AutoModelForImageTextToText.from_pretrained(saved_again)
    assert torch.equal(head(saved_again), loaded.lm_head.weight)
    lines: list[str] = []
    export(str(saved_again), tmp_path / "out", Options(k=3), lines.append)
    assert "has model.safetensors and shards with other weights; model.safetensors is taken" in lines[0]


def test_equal_copies_are_not_worth_a_word(tmp_path):
    root = tiny.write_checkpoint(tmp_path / "model", tiny.Tiny(shards=3))
    weights = {name: tensor.read() for name, tensor in open_weights(root).items()}
    save_file(weights, root / "model.safetensors", {"format": "pt"})
    assert passed_over(root) is None


UNTIED = [
    ("dinov2-qwen2", {}),
    ("qwen25-wide", {}),
    ("clip-list", {}),
    ("dinov2-qwen2-wide", {"optimize": "ort"}),
]


@pytest.mark.parametrize(("variant", "options"), UNTIED)
def test_a_head_of_its_own_values_is_not_tied(variant, options, tiny_checkpoint, tmp_path):
    root = shutil.copytree(tiny_checkpoint(variant), tmp_path / "model")
    assert json.loads((root / "config.json").read_text())["tie_word_embeddings"]
    weights = load_file(root / "model.safetensors")
    key = next(name for name in weights if name.endswith("embed_tokens.weight"))
    head = {"model.embed_tokens.weight": "lm_head.weight"}.get(
        key, key.replace("model.embed_tokens", "lm_head")
    )
    head = "lm_head.weight" if key.startswith("model.") else head
    spread = 0.1 * torch.randn(weights[key].shape, generator=torch.Generator().manual_seed(0))
    weights[head] = (weights[key] * 0.5 + spread).to(weights[key].dtype)
    save_file(weights, root / "model.safetensors", {"format": "pt"})
    qwen = variant.startswith("qwen")
    theirs: Any = HuggingFaceQwen(root) if qwen else HuggingFace(root)
    assert not torch.equal(theirs.model.lm_head.weight, theirs.model.get_input_embeddings().weight)
    export(str(root), tmp_path / "out", Options(k=6, **options))
    with Pipeline.load(tmp_path / "out") as vlm:
        answer = vlm.ask(PICTURE, QUESTION, max_new_tokens=12, stream=False)
        how = {"budgets": [6]} if qwen else {"k": 6, "positions": vlm.manifest.positions, "may_end": True}
    expected = theirs.pruned([PICTURE], answer.prompt.ids, answer.prompt.text_token_ids, steps=12, **how)
    assert answer.token_ids == expected.token_ids


def test_equal_heads_stay_tied(tiny_checkpoint, tmp_path):
    """As torch.save keeps both names of a tied pair."""
    root = shutil.copytree(tiny_checkpoint("dinov2-qwen2"), tmp_path / "model")
    weights = load_file(root / "model.safetensors")
    key = next(name for name in weights if name.endswith("embed_tokens.weight"))
    weights["lm_head.weight"] = weights[key].clone()
    save_file(weights, root / "model.safetensors", {"format": "pt"})
    export(str(root), tmp_path / "out", Options(k=6))


PLACES = (
    "embed_tokens.weight",
    "layers.1.mlp.down_proj.weight",
    "lm_head.weight",
    "multi_modal_projector.linear_1.bias",
)


@pytest.mark.parametrize(("place", "dtype", "value"), [
    *((place, "fp32", float("nan")) for place in PLACES),
    (PLACES[1], "fp32", float("inf")),
    (PLACES[1], "q4", float("nan")),
    (PLACES[2], "int8", float("-inf")),
    (PLACES[1], "fp16", float("nan")),
])  # fmt: skip
def test_a_weight_that_is_no_number_is_named(place, dtype, value, tiny_checkpoint, tmp_path):
    root = shutil.copytree(tiny_checkpoint("clip-llama"), tmp_path / "model")
    weights = load_file(root / "model.safetensors")
    key = next(name for name in weights if name.endswith(place))
    weights[key].view(-1)[-1] = value
    save_file(weights, root / "model.safetensors", {"format": "pt"})
    what = "NaN" if value != value else "infinite numbers"
    with pytest.raises(
        ResPruneError, match=f"{place} in .* has {what}, so every answer would be void"
    ) as told:
        export(str(root), tmp_path / "out", Options(k=3, dtype=dtype))
    assert "\n" not in str(told.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("place", "dtype", "value", "largest"), [
    (PLACES[1], "fp16", 1e5, "65,504"),
    (PLACES[0], "fp16", -1e5, "65,504"),
    (PLACES[1], "q4f16", 1e5, "65,504"),  # what a packed number stands for is half there
    (PLACES[0], "decoder=q4,embed=q8", 1e5, "65,504"),  # and what is looked up, everywhere
    (PLACES[1], "q4", 1e6, "458,528"),  # its scale would be past half's range
])  # fmt: skip
def test_a_weight_that_its_precision_cannot_hold_is_named(
    place, dtype, value, largest, tiny_checkpoint, tmp_path, capsys
):
    root = shutil.copytree(tiny_checkpoint("siglip-mistral"), tmp_path / "model")
    key = spoil_bf16(root, place, value)
    assert main(["export", str(root), str(tmp_path / "out"), "-k", "3", "--dtype", dtype]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert f"{place} in " in told, key
    assert f"the largest that its precision can hold is {largest}; export with --dtype bf16 or fp32" in told
    assert not (tmp_path / "out").exists()


def test_bf16_holds_it(tiny_checkpoint, tmp_path):
    root = shutil.copytree(tiny_checkpoint("siglip-mistral"), tmp_path / "model")
    spoil_bf16(root, PLACES[1], 1e5)
    bundle = read_bundle(export(str(root), tmp_path / "out", Options(k=3, dtype="bf16")))
    equal, total = bundle.manifest.parity["weights"].split("/")
    assert equal == total


def spoil_bf16(root, place, value):
    """Give the last number of the weight that ends in `place` a `value`, in the bf16 checkpoint `root`; its name."""
    file, key = next(
        (file, name)
        for file in root.glob("*.safetensors")
        for name in load_file(file)
        if name.endswith(place)
    )
    weights = load_file(file)
    assert weights[key].dtype == torch.bfloat16
    weights[key].view(-1)[-1] = value
    save_file(weights, file, {"format": "pt"})
    return key
