"""Random-weight Qwen2-VL, Qwen2.5-VL and Qwen3-VL checkpoints small enough to export in seconds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from tests.tiny import make_tokenizer

SPECIAL = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# As Qwen's own does: a system turn of its own, and each picture as one pad token between two marks.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class TinyQwen:
    """One variant; the defaults are windows of 3 x 3 merged tokens in blocks 0 and 2, full attention in 1 and 3."""

    model_type: str = "qwen2_5_vl"
    patch_size: int = 7
    depth: int = 4
    full_blocks: tuple[int, ...] = (1, 3)
    window_size: int = 42
    planes: tuple[int, ...] = ()
    """The blocks whose rows Qwen3-VL adds to its first layers."""
    layers: int = 2
    tied: bool = False
    max_tokens: int = 60
    dtype: torch.dtype = torch.float32
    old_names: bool = False
    """Weight names and a flat config of transformers 4, as Qwen's own checkpoints have them."""
    outliers: bool = False
    """MLPs whose products pass the range of half precision, as those of the real checkpoints do."""
    seed: int = 0


VARIANTS = {
    "qwen25": TinyQwen(),
    "qwen25-wide": TinyQwen(
        patch_size=4,
        depth=3,
        full_blocks=(2,),
        window_size=32,
        tied=True,
        dtype=torch.bfloat16,
        old_names=True,
        seed=1,
    ),
    "qwen2": TinyQwen(model_type="qwen2_vl", seed=2),
    "outliers": TinyQwen(outliers=True, seed=3),
    "qwen3": TinyQwen(model_type="qwen3_vl", planes=(0, 2), seed=31),
    # As the 2B and 4B: tied; three planes for three layers.
    "qwen3-tied": TinyQwen(
        model_type="qwen3_vl",
        patch_size=4,
        depth=3,
        planes=(0, 1, 2),
        layers=3,
        tied=True,
        dtype=torch.bfloat16,
        seed=32,
    ),
}


def write_checkpoint(root: Path, tiny: TinyQwen) -> Path:
    """Write a whole checkpoint into `root`; returns `root`."""
    root.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(list(SPECIAL), special_tokens=True)
    tokenizer.eos_token = "<|im_end|>"
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    make_model(tiny, len(tokenizer), ids).to(tiny.dtype).save_pretrained(root)
    if tiny.old_names:
        _rename(root)
    tokenizer.save_pretrained(root)
    (root / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    factor = 2 * tiny.patch_size
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": 4 * factor**2,
        "max_pixels": tiny.max_tokens * factor**2,
        "patch_size": tiny.patch_size,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (root / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))
    return root


def make_model(tiny: TinyQwen, vocab_size: int, ids: dict[str, int]) -> Any:
    """The model in float32, seeded; weights are large enough that greedy decoding does not repeat one token."""
    torch.manual_seed(tiny.seed)
    windows = tiny.model_type == "qwen2_5_vl"
    vision = {
        "depth": tiny.depth,
        "num_heads": 2,
        "patch_size": tiny.patch_size,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    if tiny.model_type == "qwen3_vl":
        vision |= {
            "hidden_size": 48,
            "intermediate_size": 64,
            "out_hidden_size": 64,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": list(tiny.planes),
        }
    elif windows:
        vision |= {
            "hidden_size": 48,
            "intermediate_size": 64,
            "out_hidden_size": 64,
            "window_size": tiny.window_size,
            "fullatt_block_indexes": list(tiny.full_blocks),
        }
    else:
        vision |= {"embed_dim": 48, "hidden_size": 64, "mlp_ratio": 2}
    config_class, model_class = {
        "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
        "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
        "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
    }[tiny.model_type]
    of_language: dict[str, Any] = {"head_dim": 16} if tiny.model_type == "qwen3_vl" else {}
    config = config_class(
        vision_config=vision,
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": tiny.layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            **of_language,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tiny.tied,
    )
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(tiny.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                scale = 1.0 if "embed_tokens" in name else 2.0 / parameter[0].numel() ** 0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            if tiny.outliers and ".1.mlp." in name and name.endswith(("gate_proj.weight", "up_proj.weight")):
                parameter[0] *= 150  # their product is about 10⁵
        # Never the likeliest token: an answer goes on for as long as it is compared.
        model.lm_head.weight[ids["<|im_end|>"]] = 0
    return model


def _rename(root: Path) -> None:
    from safetensors.torch import load_file, save_file

    def old(name: str) -> str:
        return name.removeprefix("model.") if ".visual." in name else name.replace("language_model.", "")

    weights = load_file(root / "model.safetensors")
    renamed = {old(name): tensor for name, tensor in weights.items()}
    save_file(renamed, root / "model.safetensors", {"format": "pt"})
    config = json.loads((root / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    flat = text | config | {"tie_word_embeddings": config["tie_word_embeddings"]}
    flat["vision_config"] |= {"model_type": "qwen2_5_vl"}
    (root / "config.json").write_text(json.dumps(flat, indent=2))
