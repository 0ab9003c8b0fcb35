"""Random-weight Gemma 3 checkpoints small enough to export in seconds."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedTokenizerFast

from tests.tiny import make_tokenizer, randomize, rename_weights

MARKS = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}
# As Gemma 3's own: a model's turn is called so, texts are trimmed, and a system turn goes into the first of the user.
CHAT_TEMPLATE = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- if messages[0]['content'] is string -%}"
    "{%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}{%- else -%}"
    "{%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}{%- endif -%}"
    "{%- set loop_messages = messages[1:] -%}{%- else -%}{%- set first_user_prefix = '' -%}"
    "{%- set loop_messages = messages -%}{%- endif -%}{%- for message in loop_messages -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}{%- set role = 'model' -%}{%- else -%}"
    "{%- set role = message['role'] -%}{%- endif -%}"
    "{{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}"
    "{%- if message['content'] is string -%}{{ message['content'] | trim }}"
    "{%- elif message['content'] is iterable -%}{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}"
    "{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}"
    "{%- else -%}{{ raise_exception('Invalid content type') }}{%- endif -%}{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)


@dataclass(frozen=True)
class TinyGemma:
    """One variant; the defaults are 8 x 8 patches of 4 pixels, 4 x 4 tokens, and two windowed layers before a full one.

    The window is shorter than an image.
    """

    layer_types: tuple[str, ...] = ("sliding_attention", "sliding_attention", "full_attention")
    window: int = 7
    kv_heads: int = 2
    tied: bool = True
    dtype: torch.dtype = torch.bfloat16
    image_token_outside: bool = False
    """Whether the image token's id is past the embedding table."""
    old_names: bool = False
    """Weight names of transformers 4, as the published checkpoints have them."""
    vision: dict[str, Any] = field(default_factory=dict)
    language_options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0


VARIANTS = {
    # As the published ones: linear scaling of the full layers' angles alone, no pooling head.
    "gemma3": TinyGemma(
        old_names=True,
        vision={"vision_use_head": False},
        language_options={"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        seed=41,
    ),
    "gemma3-outside": TinyGemma(
        layer_types=("full_attention", "sliding_attention", "full_attention"),
        window=12,
        kv_heads=1,
        tied=False,
        dtype=torch.float32,
        image_token_outside=True,
        language_options={
            "attention_bias": True,
            "rope_theta": 5000.0,
            "rope_local_base_freq": 300.0,
            "query_pre_attn_scalar": 24,
        },
        seed=42,
    ),
}


def write_checkpoint(root: Path, tiny: TinyGemma) -> Path:
    """Write a whole checkpoint into `root`; returns `root`."""
    tokenizer = _tokenizer()
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in MARKS.items()}
    config = Gemma3Config(
        text_config={
            "model_type": "gemma3_text",
            "vocab_size": ids["image_token"] if tiny.image_token_outside else len(tokenizer),
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": len(tiny.layer_types),
            "layer_types": list(tiny.layer_types),
            "num_attention_heads": 4,
            "num_key_value_heads": tiny.kv_heads,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": tiny.window,
            "max_position_embeddings": 512,
            "tie_word_embeddings": tiny.tied,
            **tiny.language_options,
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 4,
            **tiny.vision,
        },
        mm_tokens_per_image=16,
        boi_token_index=ids["boi_token"],
        eoi_token_index=ids["eoi_token"],
        image_token_index=ids["image_token"],
        tie_word_embeddings=tiny.tied,
    )
    torch.manual_seed(tiny.seed)
    model = Gemma3ForConditionalGeneration(config).eval()
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    randomize(model, tiny.seed, end)
    _enliven(model.model.language_model)
    model.generation_config.eos_token_id = [end]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    root.mkdir(parents=True, exist_ok=True)
    model.to(tiny.dtype).save_pretrained(root, save_original_format=False)
    if tiny.old_names:
        rename_weights(root)
    tokenizer.save_pretrained(root)
    (root / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    settings = {
        "image_processor_type": "Gemma3ImageProcessor",
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_pan_and_scan": None,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_seq_length": 16,
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": 32, "width": 32},
    }
    (root / "preprocessor_config.json").write_text(json.dumps(settings))
    return root


def _enliven(language_model: Any) -> None:
    """So that answers depend on images: small embeddings, and attention that looks at some rows."""
    with torch.no_grad():
        language_model.embed_tokens.weight.mul_(0.02)
        for name, parameter in language_model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.add_(0.7)


def _tokenizer() -> PreTrainedTokenizerFast:
    """The base tokenizer with Gemma's marks and its tokens of several new lines; the image token has the last id."""
    base = make_tokenizer()
    base.add_tokens([AddedToken("\n" * count, normalized=False) for count in (2, 3, 4)])
    base.add_special_tokens(
        {"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>", *MARKS.values()]}
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=base.backend_tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=MARKS,
    )
