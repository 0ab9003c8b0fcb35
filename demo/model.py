"""The demo model: a LLaVA of a few million weights, its start values, and its Hugging Face folder."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from demo.scenes import PATCH, SIDE
from demo.vocabulary import BOS, EOS, IMAGE, PAD

if TYPE_CHECKING:
    from transformers import LlavaProcessor


@dataclass(frozen=True)
class Size:
    """Widths and depths of the two transformers."""

    vision_hidden: int = 160
    vision_layers: int = 4
    vision_heads: int = 5
    vision_mlp: int = 640
    text_hidden: int = 128
    text_layers: int = 4
    text_heads: int = 4
    text_kv_heads: int = 2
    text_mlp: int = 384


def build_config(size: Size, processor: LlavaProcessor) -> LlavaConfig:
    """Return the LLaVA configuration for a size and a tokenizer."""
    tokenizer = processor.tokenizer
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in (BOS, EOS, PAD, IMAGE)}
    values = asdict(size)
    vision = CLIPVisionConfig(
        hidden_size=values["vision_hidden"],
        num_hidden_layers=values["vision_layers"],
        num_attention_heads=values["vision_heads"],
        intermediate_size=values["vision_mlp"],
        projection_dim=values["vision_hidden"],
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=values["text_hidden"],
        num_hidden_layers=values["text_layers"],
        num_attention_heads=values["text_heads"],
        num_key_value_heads=values["text_kv_heads"],
        intermediate_size=values["text_mlp"],
        max_position_embeddings=1024,
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
        pad_token_id=ids[PAD],
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids[IMAGE],
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        pad_token_id=ids[PAD],
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
    )


def build_model(size: Size, processor: LlavaProcessor, seed: int) -> LlavaForConditionalGeneration:
    """Return an untrained model.

    The start values keep word embeddings and visual rows both near a standard deviation of one: an
    unscaled start gave visual rows a thousand times larger than the words.
    """
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(build_config(size, processor))
    depth = 2 * max(size.vision_layers, size.text_layers)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            scale = 1.0 / math.sqrt(module.in_features)
            if name.endswith(("out_proj", "fc2", "o_proj", "down_proj")):
                scale /= math.sqrt(depth)
            elif name.endswith("linear_2"):
                scale *= 1.6  # GELU halves the signal
            elif name.endswith("lm_head"):
                scale *= 0.5
            nn.init.normal_(module.weight, std=scale)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
        elif isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=1.0 / math.sqrt(module.weight[0].numel()))
    return model


def save_model(model: LlavaForConditionalGeneration, processor: LlavaProcessor, directory: Path) -> None:
    """Write a half-precision Hugging Face folder that Auto classes load."""
    tokenizer = processor.tokenizer
    copy = LlavaForConditionalGeneration(model.config)
    copy.load_state_dict(model.state_dict())
    copy = copy.half()
    copy.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=16,
    )
    copy.save_pretrained(directory)
    processor.save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)
