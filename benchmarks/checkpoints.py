"""Checkpoints of real shape with random weights, written tensor by tensor so that size does not matter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from resprune.exporter.checkpoint.weightless import blank

DEMO = Path(__file__).parent.parent / "demo" / "model"
SHARD_BYTES = 1 << 30


def write_checkpoint(
    folder: Path, model_class: Any, config: Any, *, dtype: torch.dtype, image_side: int, seed: int = 0
) -> None:
    """Write `config` with random weights in `dtype`, and the demo's tokenizer and template."""
    write_weights(folder, model_class, config, dtype=dtype, seed=seed)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(DEMO / name, folder / name)
    processor = json.loads((DEMO / "processor_config.json").read_text())
    processor["image_processor"]["size"] = {"shortest_edge": image_side}
    processor["image_processor"]["crop_size"] = {"height": image_side, "width": image_side}
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2))


def write_weights(folder: Path, model_class: Any, config: Any, *, dtype: torch.dtype, seed: int = 0) -> None:
    """Make `folder` and write into it `config` and random weights in `dtype`.

    Weights are normal with the deviation that keeps activations near one, 1/√(inputs); norms are one and biases
    zero. Never more than one shard is in memory.
    """
    folder.mkdir(parents=True)
    model = blank(model_class, config)
    index: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(_shards(model, dtype, seed)):
        name = f"model-{number:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, name))
        total += sum(tensor.nbytes for tensor in shard.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    config.save_pretrained(folder)


def _shards(model: nn.Module, dtype: torch.dtype, seed: int) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shard: dict[str, Tensor] = {}
    size = 0
    for name, parameter in model.named_parameters():
        shard[name] = _values(name, parameter.shape, generator).to(dtype)
        size += shard[name].nbytes
        if size >= SHARD_BYTES:
            yield shard
            shard, size = {}, 0
    if shard:
        yield shard


def _values(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    if len(shape) < 2:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    inputs = shape[1:].numel()
    return torch.randn(shape, generator=generator) / inputs**0.5


def llava_config(vision: dict[str, int], text: dict[str, int]) -> LlavaConfig:
    """A LLaVA-1.5 configuration over the demo's vocabulary, or a larger one whose first tokens are the demo's."""
    demo = LlavaConfig.from_pretrained(DEMO)
    ids = {key: getattr(demo.text_config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**{"vocab_size": demo.text_config.vocab_size, **text, **ids}),
        image_token_id=demo.image_token_id,
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


ONE_LAYER_4096 = {
    "hidden_size": 4096,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}


def write_llava15_vision(folder: Path) -> None:
    """LLaVA-1.5's tower and projector at their real shapes (576 tokens of 4,096), on a one-layer language model."""
    config = llava_config(CLIP_L_336, ONE_LAYER_4096)
    write_checkpoint(
        folder, LlavaForConditionalGeneration, config, dtype=torch.float16, image_side=336, seed=0
    )


LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
}


def write_llava15_slice(folder: Path) -> None:
    """LLaVA-1.5-7B with its real tower and projector, and the first two of its language model's 32 layers."""
    config = llava_config(CLIP_L_336, LLAMA_7B | {"num_hidden_layers": 2})
    write_checkpoint(
        folder, LlavaForConditionalGeneration, config, dtype=torch.float16, image_side=336, seed=0
    )


def write_llava_next_vision(folder: Path) -> None:
    """LLaVA-NeXT's tower, projector and resolutions (up to 2,928 tokens of 4,096), on a one-layer language model."""
    llava = llava_config(CLIP_L_336, ONE_LAYER_4096)
    shared = ("vision_config", "text_config", "image_token_id", "vision_feature_layer")
    config = LlavaNextConfig(**{key: getattr(llava, key) for key in shared})
    write_checkpoint(
        folder, LlavaNextForConditionalGeneration, config, dtype=torch.float16, image_side=336, seed=0
    )
    processor = json.loads((folder / "processor_config.json").read_text())
    processor["processor_class"] = "LlavaNextProcessor"
    processor["image_processor"] |= {
        "image_processor_type": "LlavaNextImageProcessor",
        "image_grid_pinpoints": config.image_grid_pinpoints,
    }
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2))


# What repeats in the 32 blocks of Qwen2.5-VL-3B's tower: seven with windows, then one with full attention.
QWEN25VL_PERIOD = {
    "depth": 8,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 2048,
    "window_size": 112,
    "fullatt_block_indexes": [7],
}


def write_qwen25vl_vision(folder: Path) -> None:
    """A quarter of the depth of Qwen2.5-VL-3B's tower, and its merger, at real widths, on one layer of language."""
    text: dict[str, Any] = ONE_LAYER_4096 | {
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "max_position_embeddings": 32768,
    }
    del text["head_dim"]
    _write_qwen25vl(folder, QWEN25VL_PERIOD, text, torch.float16)


def _write_qwen25vl(
    folder: Path, vision: dict[str, Any], text: dict[str, Any], dtype: torch.dtype, tied: bool = False
) -> None:
    demo = LlavaConfig.from_pretrained(DEMO)
    config = Qwen2_5_VLConfig(
        vision_config=vision,
        text_config={
            "vocab_size": demo.text_config.vocab_size,
            "bos_token_id": demo.text_config.bos_token_id,
            "eos_token_id": demo.text_config.eos_token_id,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            **text,
        },
        image_token_id=demo.image_token_id,
        tie_word_embeddings=tied,
    )
    write_checkpoint(folder, Qwen2_5_VLForConditionalGeneration, config, dtype=dtype, image_side=336, seed=0)
    processor = {"image_processor_type": "Qwen2VLImageProcessor", "max_pixels": 4096 * 28 * 28}
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))


def write_llava15_7b(folder: Path) -> None:
    """All of LLaVA-1.5-7B's shapes in fp16, 14 GB: the vocabulary has more rows than the tokenizer has tokens."""
    config = llava_config(CLIP_L_336, {"vocab_size": 32064} | LLAMA_7B)
    write_checkpoint(
        folder, LlavaForConditionalGeneration, config, dtype=torch.float16, image_side=336, seed=0
    )


QWEN25VL_TOWER: dict[str, Any] = QWEN25VL_PERIOD | {"depth": 32, "fullatt_block_indexes": [7, 15, 23, 31]}
QWEN25_3B = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128000,
}


def write_qwen25vl_3b(folder: Path) -> None:
    """All of Qwen2.5-VL-3B's shapes in bf16, 7.5 GB; embeddings and head are one, as in the real one."""
    text = {"vocab_size": 151936} | QWEN25_3B
    _write_qwen25vl(folder, QWEN25VL_TOWER, text, torch.bfloat16, tied=True)
