"""Random-weight InternVL, SmolVLM and Idefics3 checkpoints small enough to export in seconds."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from tests.tiny import make_tokenizer, randomize

INTERNVL_SPECIAL = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
# As InternVL3's own: each image's context token and a new line.
INTERNVL_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# <image> is one of the base tokenizer's special tokens already.
SMOLVLM_SPECIAL = (
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)
# As SmolVLM2's own, with its colon before an image and its colon and space before text.
SMOLVLM_TEMPLATE = (
    "<s>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'] is not string and message['content'][0]['type'] == 'image' %}{{ ':' }}"
    "{% else %}{{ ': ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}{% endif %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


@dataclass(frozen=True)
class TinyTiles:
    """One variant; the defaults are tiles of 32 pixels, 4 x 4 patches and 2 x 2 tokens."""

    model_type: str
    language: str
    image_size: int = 32
    patch_size: int = 8
    hidden: int = 48
    heads: int = 4
    kv_heads: int = 2
    tied: bool = False
    dtype: torch.dtype = torch.float32
    vision: dict[str, Any] = field(default_factory=dict)
    language_options: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    """Further fields of the whole model's config."""
    processor: dict[str, Any] = field(default_factory=dict)
    seed: int = 0


VARIANTS: dict[str, TinyTiles] = {
    # As InternVL3: Qwen2, six tiles here.
    "internvl-qwen2": TinyTiles("internvl", "qwen2", processor={"max_patches": 6}, seed=21),
    # As InternVL3.5 and its larger towers: Qwen3, normalised queries and keys and RMS norms in the tower too.
    "internvl-qwen3": TinyTiles(
        "internvl",
        "qwen3",
        tied=True,
        dtype=torch.bfloat16,
        vision={
            "use_qk_norm": True,
            "norm_type": "rms_norm",
            "attention_bias": True,
            "use_mean_pooling": False,
        },
        language_options={"head_dim": 16},
        processor={"max_patches": 4, "min_patches": 2},
        seed=22,
    ),
    "internvl-layer": TinyTiles(
        "internvl",
        "qwen2",
        hidden=64,
        options={"vision_feature_layer": -2},
        processor={"max_patches": 1},
        seed=23,
    ),
    "smolvlm": TinyTiles("smolvlm", "llama", tied=True, processor={"size": {"longest_edge": 128}}, seed=24),
    "idefics3": TinyTiles(
        "idefics3",
        "llama",
        image_size=36,
        patch_size=6,
        hidden=64,
        dtype=torch.float16,
        options={"scale_factor": 3},
        processor={"size": {"longest_edge": 72}},
        seed=25,
    ),
    "smolvlm-whole": TinyTiles("smolvlm", "llama", processor={"do_image_splitting": False}, seed=26),
}
LANGUAGES = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}
MODELS: dict[str, tuple[Any, Any]] = {
    "internvl": (InternVLConfig, InternVLForConditionalGeneration),
    "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration),
    "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration),
}


def write_checkpoint(root: Path, tiny: TinyTiles) -> Path:
    """Write a whole checkpoint into `root`; returns `root`."""
    internvl = tiny.model_type == "internvl"
    tokenizer = make_tokenizer()
    special = INTERNVL_SPECIAL if internvl else SMOLVLM_SPECIAL
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    end = "<|im_end|>" if internvl else "<end_of_utterance>"
    tokenizer.eos_token = end
    config_class, model_class = MODELS[tiny.model_type]
    image_token = "<IMG_CONTEXT>" if internvl else "<image>"
    text_config = LANGUAGES[tiny.language](
        vocab_size=len(tokenizer),
        hidden_size=tiny.hidden,
        intermediate_size=2 * tiny.hidden,
        num_hidden_layers=2,
        num_attention_heads=tiny.heads,
        num_key_value_heads=tiny.kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=tiny.tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **tiny.language_options,
    )
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": tiny.image_size,
        "patch_size": tiny.patch_size,
        **tiny.vision,
    }
    config = config_class(
        vision_config=vision,
        text_config=text_config.to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids(image_token),
        tie_word_embeddings=tiny.tied,
        **tiny.options,
    )
    torch.manual_seed(tiny.seed)
    model = model_class(config).eval()
    randomize(model, tiny.seed, tokenizer.eos_token_id)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    root.mkdir(parents=True, exist_ok=True)
    model.to(tiny.dtype).save_pretrained(root)
    tokenizer.save_pretrained(root)
    (root / "chat_template.jinja").write_text(INTERNVL_TEMPLATE if internvl else SMOLVLM_TEMPLATE)
    _write_processor(root, tiny)
    return root


def _write_processor(root: Path, tiny: TinyTiles) -> None:
    if tiny.model_type == "internvl":
        settings: dict[str, Any] = {
            "image_processor_type": "GotOcr2ImageProcessor",
            "crop_to_patches": True,
            "size": {"height": tiny.image_size, "width": tiny.image_size},
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        }
    else:
        kind = "SmolVLMImageProcessor" if tiny.model_type == "smolvlm" else "Idefics3ImageProcessor"
        settings = {
            "image_processor_type": kind,
            "max_image_size": {"longest_edge": tiny.image_size},
            "size": {"longest_edge": 4 * tiny.image_size},
            "do_image_splitting": True,
            "do_pad": True,
        }
    settings = {
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
    } | settings
    (root / "preprocessor_config.json").write_text(json.dumps(settings | tiny.processor))
