"""Models of the three families with random weights, whose language model outweighs the tower as it does in life."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
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

from benchmarks.checkpoints import CLIP_L_336, QWEN25VL_PERIOD, write_weights
from benchmarks.vocabulary import LLAMA, QWEN, write_tokenizer

QUESTION = "What color is the large square, and how many circles are there to the left of it?"


@dataclass(frozen=True)
class Shape:
    """One model and the picture it is asked about: `picture` (width, height) pixels become `num_tokens` tokens."""

    name: str
    family: str
    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    picture: tuple[int, int]
    num_tokens: int
    words: str
    """What the tables say of it."""

    @property
    def budgets(self) -> tuple[int, ...]:
        """K = N/9, N/4.5, N/3, the paper's three for every family."""
        return tuple(round(self.num_tokens * ninths / 9) for ninths in (1, 2, 3))


# Llama's own proportions at a width of 2,048: 1.1 B parameters with its 32,064 words.
LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 4096,
}
# 20 of the 28 layers of Qwen2.5-1.5B: 1.2 B parameters. Eight of the 32 blocks of Qwen2.5-VL's tower (a fifth of its
# language model in the 3B, a tenth in the 7B) are a seventh of that.
QWEN_1B = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 20,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
}

LLAVA = Shape(
    "llava15",
    "llava",
    CLIP_L_336,
    LLAMA_1B,
    (336, 336),
    576,
    "LLaVA-1.5: CLIP-L/336, Llama of 1.1 B",
)
LLAVA_NEXT = replace(
    LLAVA,
    name="llava-next",
    family="llava_next",
    picture=(672, 336),
    num_tokens=1752,
    words="LLaVA-NeXT: three tiles of CLIP-L/336, Llama of 1.1 B",
)
QWEN25VL = Shape(
    "qwen25vl",
    "qwen2_5_vl",
    QWEN25VL_PERIOD,
    QWEN_1B,
    (672, 672),
    576,
    "Qwen2.5-VL: 8 of the 32 blocks of its tower, 20 of the 28 layers of Qwen2.5-1.5B",
)
REAL = (LLAVA, LLAVA_NEXT, QWEN25VL)


def write_shape(shape: Shape, folder: Path) -> None:
    """The checkpoint of `shape` in bfloat16, as published ones are, with a tokenizer of the real size."""
    model_class, config = CONFIGS[shape.family](shape)
    config.architectures = [model_class.__name__]  # without it vLLM makes an embedder of it
    write_weights(folder, model_class, config, dtype=torch.bfloat16)
    qwen = shape.family == "qwen2_5_vl"
    write_tokenizer(
        folder, QWEN if qwen else LLAMA, "Qwen2TokenizerFast" if qwen else "PreTrainedTokenizerFast"
    )
    if qwen:
        _as_published(folder / "config.json")
    _write_processor(shape, config, folder)


def _as_published(path: Path) -> None:
    """Rotary settings as Qwen's own checkpoints have them: transformers 4, which optimum-intel needs, reads those."""
    config = json.loads(path.read_text())
    rope = config["text_config"].pop("rope_parameters")
    config["text_config"] |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    path.write_text(json.dumps(config, indent=2))


def write_picture(size: tuple[int, int], path: Path) -> None:
    """A seeded picture of `size` (width, height) pixels: coloured blocks and noise."""
    rng = np.random.default_rng(0)
    width, height = size
    blocks = (
        rng.integers(0, 256, (-(-height // 42), -(-width // 42), 3)).repeat(42, axis=0).repeat(42, axis=1)
    )
    noise = rng.integers(-20, 21, (height, width, 3))
    pixels = np.clip(blocks[:height, :width] + noise, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def _llava_parts(shape: Shape) -> dict[str, Any]:
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": LLAMA.special[LLAMA.pad]}
    return {
        "vision_config": CLIPVisionConfig(**shape.vision),
        "text_config": LlamaConfig(vocab_size=LLAMA.size, **shape.text, **ids),
        "image_token_id": LLAMA.special[LLAMA.image],
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }


def _llava(shape: Shape) -> tuple[Any, Any]:
    return LlavaForConditionalGeneration, LlavaConfig(
        **_llava_parts(shape), image_seq_length=shape.num_tokens
    )


def _llava_next(shape: Shape) -> tuple[Any, Any]:
    return LlavaNextForConditionalGeneration, LlavaNextConfig(**_llava_parts(shape))


def _qwen25vl(shape: Shape) -> tuple[Any, Any]:
    special = QWEN.special
    return Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig(
        vision_config=dict(shape.vision) | {"out_hidden_size": shape.text["hidden_size"]},
        text_config=dict(shape.text)
        | {
            "vocab_size": QWEN.size,
            "bos_token_id": special[QWEN.pad],
            "eos_token_id": special[QWEN.eos],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        image_token_id=special[QWEN.image],
        video_token_id=special["<|video_pad|>"],
        vision_start_token_id=special["<|vision_start|>"],
        vision_end_token_id=special["<|vision_end|>"],
        tie_word_embeddings=True,
    )


CONFIGS = {"llava": _llava, "llava_next": _llava_next, "qwen2_5_vl": _qwen25vl}


def _write_processor(shape: Shape, config: Any, folder: Path) -> None:
    clip = {
        "do_convert_rgb": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    if shape.family == "qwen2_5_vl":
        own = {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
            "min_pixels": 56 * 56,
            "max_pixels": 1280 * 28 * 28,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(clip | own, indent=2))
        return
    side = shape.vision["image_size"]
    own = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "resample": 3,
    }
    if shape.family == "llava_next":
        own |= {
            "image_processor_type": "LlavaNextImageProcessor",
            "image_grid_pinpoints": config.image_grid_pinpoints,
        }
    (folder / "preprocessor_config.json").write_text(json.dumps(clip | own, indent=2))
    processor = {
        "processor_class": "LlavaProcessor" if shape.family == "llava" else "LlavaNextProcessor",
        "image_token": LLAMA.image,
        "patch_size": shape.vision["patch_size"],
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2))


def write_language_model(checkpoint: Path, folder: Path) -> None:
    """The Llama of a LLaVA checkpoint by itself, under the names that a `LlamaForCausalLM` has."""
    folder.mkdir(parents=True)
    text = json.loads((checkpoint / "config.json").read_text())["text_config"]
    text |= {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(text, indent=2))
    index: dict[str, str] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "pt") as shard:
            own = {
                name.replace("language_model.", ""): shard.get_tensor(name)
                for name in shard.keys()  # noqa: SIM118  (no mapping)
                if "language_model." in name or name.startswith("lm_head")
            }
        if own:
            save_file(own, folder / path.name, metadata={"format": "pt"})
            index.update(dict.fromkeys(own, path.name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(checkpoint / name, folder / name)
