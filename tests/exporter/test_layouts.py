"""What looks like a checkpoint and is something else is named, with the way out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from resprune.exporter.checkpoint.checkpoint import resolve
from resprune.exporter.export import export
from resprune.exporter.options import Options
from resprune.runtime.errors import ResPruneError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
KEY = "model.language_model.layers.0.mlp.down_proj.weight"


def config(**values: Any) -> Callable[[Path], object]:
    return lambda root: (root / "config.json").write_text(json.dumps(values))


def both(name: str, **values: Any) -> Callable[[Path], None]:
    """Change a part of the config."""

    def change(root: Path) -> None:
        table = json.loads((root / "config.json").read_text())
        table[name].update(values)
        (root / "config.json").write_text(json.dumps(table))

    return change


def weight(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        weights = load_file(root / "model.safetensors")
        key = next(key for key in weights if key.endswith("layers.0.mlp.down_proj.weight"))
        weights[key] = change(weights[key]).contiguous()
        save_file(weights, root / "model.safetensors", {"format": "pt"})

    return spoil


def adapter(alone: bool) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        table = {"peft_type": "LORA", "base_model_name_or_path": "x/y"}
        (root / "adapter_config.json").write_text(json.dumps(table))
        if alone:
            (root / "config.json").unlink()
            (root / "model.safetensors").rename(root / "adapter_model.safetensors")

    return spoil


def content(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda root: (root / name).write_bytes(change((root / name).read_bytes()))


RESEARCH = {"mm_vision_tower": "openai/clip", "mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad"}
SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "llava": (
        config(model_type="llava", **RESEARCH),
        r"LLaVA-1\.5's research code \(llava\), .* such as llava-hf/llava-1\.5-7b-hf,.* convert_llava_weights_to_hf",
    ),
    "llava_llama": (
        config(model_type="llava_llama", **RESEARCH | {"image_aspect_ratio": "anyres"}),
        r"LLaVA-NeXT's research code \(llava_llama\), .* such as llava-hf/llava-v1\.6-mistral-7b-hf",
    ),
    "llava_qwen": (
        config(model_type="llava_qwen", **RESEARCH | {"image_aspect_ratio": "anyres_max_9"}),
        r"LLaVA-OneVision's research code \(llava_qwen\), .* such as llava-hf/llava-onevision-qwen2-0\.5b-ov-hf",
    ),
    "internvl_chat": (
        config(model_type="internvl_chat", auto_map={}),
        r"InternVL's research code \(internvl_chat\), .* such as OpenGVLab/InternVL3-1B-hf",
    ),
    "code of its own": (config(model_type="minimind", auto_map={}), r"type minimind with code of its own.* -hf"),
    "adapter alone": (adapter(True), r"holds an adapter of x/y .*merge_and_unload"),
    "adapter beside": (adapter(False), r"holds an adapter of x/y .*merge_and_unload"),
    "ZeRO-3": (weight(lambda value: torch.empty(0)), r"down_proj.weight .*ZeRO-3.*zero_to_fp32"),
    "FP8": (weight(lambda value: value.to(torch.float8_e4m3fn)), r"is stored as F8_E4M3, which is what quantizing"),
    "U32": (weight(lambda value: value.to(torch.uint32)), r"is stored as U32, which is what quantizing"),
    "I8": (weight(lambda value: value.to(torch.int8)), r"is stored as I8, which is what quantizing"),
    "byte order mark": (content("config.json", lambda old: b"\xef\xbb\xbf" + old), "begins with a byte order mark"),
    "UTF-16": (content("config.json", lambda old: old.decode().encode("utf-16")), "not valid JSON .*decode"),
    "nesting": (content("config.json", lambda old: b'{"a":' * 600 + b"1" + b"}" * 600), "nested too deeply"),
    "infinity": (content("generation_config.json", lambda old: b'{"top_p": 1e999}'), "'1e999' is no finite number"),
    "digits": (content("config.json", lambda old: b'{"a": ' + b"9" * 5000 + b"}"), "is not valid JSON"),
} | {
    f"LFS {name}": (content(name, lambda old: POINTER), f"{name} is a Git LFS pointer .*git lfs pull")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json")
}  # fmt: skip
# Refused before anything of that size is made.
SPOILED |= {
    f"{part}.{key} {value}": (both(part, **{key: value}), sentence)
    for part, key, value, sentence in (
        ("text_config", "num_hidden_layers", 10**9, "asks for num_hidden_layers 1000000000 and there are"),
        ("vision_config", "num_hidden_layers", 10**9, "asks for num_hidden_layers 1000000000 and there are"),
        ("text_config", "head_dim", 2**33, "head_dim of 8589934592, for which no weight is large enough"),
        (
            "text_config",
            "hidden_size",
            2**40,
            "hidden_size of 1099511627776, for which no weight is large enough",
        ),
        ("vision_config", "image_size", 2**20, "image_size of 1048576, for which no weight is large enough"),
        ("text_config", "num_hidden_layers", 10**400, "asks for num_hidden_layers a huge number"),
    )
}


@pytest.mark.parametrize(("spoil", "sentence"), SPOILED.values(), ids=SPOILED.keys())
def test_each_is_named(spoil, sentence, tiny_checkpoint, tmp_path):
    root = shutil.copytree(tiny_checkpoint("clip-llama"), tmp_path / "checkpoint")
    spoil(root)
    with pytest.raises(ResPruneError, match=sentence) as told:
        export(str(root), tmp_path / "out", Options(k=3))
    assert "\n" not in str(told.value)
    assert "corrupt" not in str(told.value)


def test_a_window_of_a_million_pixels_is_refused_before_it_is_built(tiny_checkpoint, tmp_path):
    root = shutil.copytree(tiny_checkpoint("qwen25"), tmp_path / "checkpoint")
    both("vision_config", window_size=2**20)(root)
    with pytest.raises(ResPruneError, match=r"windows of 1048576 pixels hold 74898 merged tokens a side"):
        export(str(root), tmp_path / "out", Options(k=3))


def test_an_unknown_model_with_research_keys_of_none(tiny_checkpoint, tmp_path):
    """auto_map alone says nothing against a family that is known."""
    root = shutil.copytree(tiny_checkpoint("clip-llama"), tmp_path / "checkpoint")
    table = json.loads((root / "config.json").read_text()) | {"auto_map": {"AutoModel": "x.Y"}}
    (root / "config.json").write_text(json.dumps(table))
    assert resolve(str(root)).config["auto_map"]
