"""Random-weight checkpoints small enough to export in seconds, as transformers writes them to disk."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()

IMAGE_TOKEN = "<image>"
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", IMAGE_TOKEN)
WORDS = re.findall(
    r"\w+",
    "what colour is the square on table how many circles are there a red green blue small large photo of "
    "left right cat dog USER ASSISTANT describe this picture in one word yes no",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'user' %} {% else %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@dataclass(frozen=True)
class Tiny:
    """One variant; the defaults are a CLIP tower of 17 × 8 hidden sizes and a grouped-query Llama."""

    family: str = "llava"
    tower: str = "clip"
    language: str = "llama"
    image_size: int = 32
    patch_size: int = 8
    vision_hidden: int = 32
    vision_layers: int = 3
    vision_heads: int = 4
    hidden: int = 48
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    feature_layer: int | tuple[int, ...] = -2
    strategy: str = "default"
    tied: bool = False
    dtype: torch.dtype = torch.float32
    shards: int = 1
    template: str | None = CHAT_TEMPLATE
    template_in: str = "file"
    """Where the chat template is written: "file", "processor" (chat_template.json) or "tokenizer"."""
    processor_in: str = "preprocessor"
    """Where the image processor is written: "preprocessor" or "processor" (inside processor_config.json)."""
    old_names: bool = False
    """Weight names of transformers 4."""
    projector_bias: bool = True
    tile_limit: int = 9
    """Of LLaVA-OneVision."""
    language_options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0


VARIANTS: dict[str, Tiny] = {
    "clip-llama": Tiny(),
    "siglip-mistral": Tiny(
        tower="siglip",
        language="mistral",
        image_size=42,
        patch_size=7,
        feature_layer=-1,
        strategy="full",
        dtype=torch.bfloat16,
        shards=3,
        template_in="processor",
        processor_in="processor",
        language_options={"sliding_window": 12},
        seed=1,
    ),
    "dinov2-qwen2": Tiny(
        tower="dinov2",
        language="qwen2",
        image_size=40,
        patch_size=8,
        feature_layer=2,
        kv_heads=1,
        tied=True,
        template=None,
        seed=2,
    ),
    "clip-list": Tiny(
        feature_layer=(-3, 1, -1),
        vision_hidden=36,
        vision_heads=3,
        hidden=52,
        heads=2,
        kv_heads=2,
        image_size=35,
        patch_size=5,
        layers=3,
        tied=True,
        dtype=torch.float16,
        old_names=True,
        template_in="tokenizer",
        projector_bias=False,
        seed=3,
    ),
}


# LLaVA-NeXT's own five resolutions, in tiles.
TILE_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
VARIANTS |= {
    "next-llama": Tiny(family="llava_next", seed=4),
    "next-mistral": Tiny(
        family="llava_next",
        tower="siglip",
        language="mistral",
        image_size=30,
        patch_size=7,
        feature_layer=-1,
        strategy="full",
        shards=3,
        processor_in="processor",
        language_options={"sliding_window": 20},
        seed=5,
    ),
    "next-qwen2": Tiny(
        family="llava_next",
        language="qwen2",
        kv_heads=1,
        tied=True,
        dtype=torch.float16,
        old_names=True,
        seed=6,
    ),
}

# LLaVA-OneVision's: as many tiles each way as there are, of which more than the limit's are interpolated.
ONEVISION_GRIDS = tuple((rows, columns) for rows in (1, 2, 3) for columns in (1, 2, 3, 4))
VARIANTS |= {
    # 4 x 4 patches a tile of 30 pixels, of which two are left over, as in 27 of 14 in 384.
    "onevision": Tiny(
        family="llava_onevision",
        tower="siglip",
        language="qwen2",
        image_size=30,
        patch_size=7,
        feature_layer=-1,
        strategy="full",
        tile_limit=4,
        seed=31,
    ),
    "onevision-tied": Tiny(
        family="llava_onevision",
        tower="siglip",
        language="qwen2",
        image_size=30,
        patch_size=10,
        hidden=64,
        kv_heads=1,
        feature_layer=-1,
        strategy="full",
        tied=True,
        dtype=torch.bfloat16,
        old_names=True,
        processor_in="processor",
        tile_limit=3,
        seed=32,
    ),
}

# Heads of 16, for ONNX Runtime's attention takes multiples of 8 only.
WIDE = {"clip-llama-wide": 7, "siglip-mistral-wide": 9, "dinov2-qwen2-wide": 6}
"""Their names, and the K that tests keep of each."""
VARIANTS |= {name: replace(VARIANTS[name.removesuffix("-wide")], hidden=64) for name in WIDE}


def write_checkpoint(root: Path, tiny: Tiny) -> Path:
    """Write a whole checkpoint into `root`; returns `root`."""
    root.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    model = make_model(tiny, len(tokenizer)).to(tiny.dtype)
    size = sum(parameter.nbytes for parameter in model.parameters())
    options: dict[str, Any] = {} if tiny.shards == 1 else {"max_shard_size": size // (tiny.shards - 1)}
    model.save_pretrained(root, **options)
    if tiny.old_names:
        rename_weights(root)
    tokenizer.save_pretrained(root)
    _write_template(root, tiny)
    _write_processor(root, tiny)
    return root


def make_model(
    tiny: Tiny, vocab_size: int
) -> (
    LlavaForConditionalGeneration | LlavaNextForConditionalGeneration | LlavaOnevisionForConditionalGeneration
):
    """The model in float32, seeded; weights are large enough that greedy decoding does not repeat one token."""
    torch.manual_seed(tiny.seed)
    config_class, model_class = MODELS[tiny.family]
    config = config_class(
        vision_config=TOWERS[tiny.tower](tiny),
        text_config=_language_config(tiny, vocab_size),
        image_token_index=SPECIAL.index(IMAGE_TOKEN),
        vision_feature_layer=tiny.feature_layer
        if isinstance(tiny.feature_layer, int)
        else list(tiny.feature_layer),
        vision_feature_select_strategy=tiny.strategy,
        multimodal_projector_bias=tiny.projector_bias,
        tie_word_embeddings=tiny.tied,
        **_any_resolution(tiny),
    )
    model = model_class(config).eval()
    randomize(model, tiny.seed, SPECIAL.index("</s>"))
    return model


def randomize(model: Any, seed: int, end: int) -> None:
    """Seeded weights, large enough that greedy decoding does not repeat one token.

    `end` is never the largest logit: answers are as long as asked for.
    """
    generator = torch.Generator().manual_seed(seed)
    of_language = ("language_model", "text_model", "lm_head")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                spread = 2.0 if any(part in name for part in of_language) else 1.0
                scale = 1.0 if "embed" in name else spread / parameter[0].numel() ** 0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.lm_head.weight[end] = 0


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a merge for every prefix of a few dozen words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        for prefix in ("", "Ġ"):
            components = list(prefix + word)
            while len(components) > 1:
                pair = (components[0], components[1])
                if pair not in merges:
                    merges.append(pair)
                vocabulary.setdefault("".join(pair), len(vocabulary))
                components[:2] = ["".join(pair)]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def _clip(tiny: Tiny) -> CLIPVisionConfig:
    return CLIPVisionConfig(**_tower(tiny), intermediate_size=2 * tiny.vision_hidden, projection_dim=16)


def _siglip(tiny: Tiny) -> SiglipVisionConfig:
    return SiglipVisionConfig(**_tower(tiny), intermediate_size=2 * tiny.vision_hidden)


def _dinov2(tiny: Tiny) -> Dinov2Config:
    # A larger image_size than the processor's: the position embeddings must be interpolated.
    return Dinov2Config(**(_tower(tiny) | {"image_size": 2 * tiny.image_size}), mlp_ratio=2)


TOWERS: dict[str, Callable[[Tiny], Any]] = {"clip": _clip, "siglip": _siglip, "dinov2": _dinov2}
MODELS: dict[str, tuple[Any, Any]] = {
    "llava": (LlavaConfig, LlavaForConditionalGeneration),
    "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration),
    "llava_onevision": (LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration),
}
PROCESSORS = {
    "llava": "LlavaProcessor",
    "llava_next": "LlavaNextProcessor",
    "llava_onevision": "LlavaOnevisionProcessor",
}
LANGUAGES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}


def _tower(tiny: Tiny) -> dict[str, Any]:
    return {
        "hidden_size": tiny.vision_hidden,
        "num_hidden_layers": tiny.vision_layers,
        "num_attention_heads": tiny.vision_heads,
        "image_size": tiny.image_size,
        "patch_size": tiny.patch_size,
    }


def _language_config(tiny: Tiny, vocab_size: int) -> Any:
    return LANGUAGES[tiny.language](
        vocab_size=vocab_size,
        hidden_size=tiny.hidden,
        intermediate_size=2 * tiny.hidden,
        num_hidden_layers=tiny.layers,
        num_attention_heads=tiny.heads,
        num_key_value_heads=tiny.kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=tiny.tied,
        bos_token_id=SPECIAL.index("<s>"),
        eos_token_id=SPECIAL.index("</s>"),
        pad_token_id=SPECIAL.index("<pad>"),
        **tiny.language_options,
    )


def _write_template(root: Path, tiny: Tiny) -> None:
    if tiny.template is None:
        return
    if tiny.template_in == "file":
        (root / "chat_template.jinja").write_text(tiny.template)
    elif tiny.template_in == "processor":
        (root / "chat_template.json").write_text(json.dumps({"chat_template": tiny.template}))
    else:
        config = json.loads((root / "tokenizer_config.json").read_text())
        (root / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": tiny.template}))


def _write_processor(root: Path, tiny: Tiny) -> None:
    side = tiny.image_size
    kind, size, crop = {
        "clip": ("CLIPImageProcessor", {"shortest_edge": side}, {"height": side, "width": side}),
        "siglip": ("SiglipImageProcessor", {"height": side, "width": side}, None),
        "dinov2": ("BitImageProcessor", {"shortest_edge": side + 8}, {"height": side, "width": side}),
    }[tiny.tower]
    mean = [0.5, 0.5, 0.5] if tiny.tower == "siglip" else [0.48145466, 0.4578275, 0.40821073]
    std = [0.5, 0.5, 0.5] if tiny.tower == "siglip" else [0.26862954, 0.26130258, 0.27577711]
    image_processor = {
        "image_processor_type": kind,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "do_center_crop": crop is not None,
        "resample": 2 if tiny.tower == "siglip" else 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    } | ({} if crop is None else {"crop_size": crop})
    if tiny.family == "llava_next":
        image_processor |= {
            "image_processor_type": "LlavaNextImageProcessor",
            "crop_size": {"height": side, "width": side},  # the side of a tile, also where nothing is cropped
            "image_grid_pinpoints": _resolutions(tiny),
        }
    elif tiny.family == "llava_onevision":
        image_processor |= {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "do_pad": True,
            "image_grid_pinpoints": _resolutions(tiny),
        }
    processor: dict[str, Any] = {
        "processor_class": PROCESSORS[tiny.family],
        "image_token": IMAGE_TOKEN,
        "patch_size": tiny.patch_size,
        "num_additional_image_tokens": 0 if tiny.tower == "siglip" else 1,
        "vision_feature_select_strategy": tiny.strategy,
    }
    if tiny.processor_in == "processor":
        processor["image_processor"] = image_processor
    else:
        (root / "preprocessor_config.json").write_text(json.dumps(image_processor, indent=2))
    (root / "processor_config.json").write_text(json.dumps(processor, indent=2))


def _any_resolution(tiny: Tiny) -> dict[str, Any]:
    """Fields of the config."""
    if tiny.family == "llava":
        return {}
    limit = (
        {"vision_aspect_ratio": f"anyres_max_{tiny.tile_limit}"} if tiny.family == "llava_onevision" else {}
    )
    return {"image_grid_pinpoints": _resolutions(tiny), **limit}


def _resolutions(tiny: Tiny) -> list[list[int]]:
    grids = TILE_GRIDS if tiny.family == "llava_next" else ONEVISION_GRIDS
    return [[rows * tiny.image_size, columns * tiny.image_size] for rows, columns in grids]


def rename_weights(root: Path) -> None:
    """Give the weights of a single file the names that transformers 4 wrote."""
    from safetensors.torch import load_file, save_file

    def old(name: str) -> str:
        name = name.replace("model.language_model.", "language_model.model.").replace(
            "lm_head.", "language_model.lm_head."
        )
        name = name.replace("model.vision_tower.", "vision_tower.")
        name = (
            name.replace("vision_tower.", "vision_tower.vision_model.")
            if "vision_model" not in name
            else name
        )
        name = name.replace("model.image_newline", "image_newline")
        return name.replace("model.multi_modal_projector.", "multi_modal_projector.")

    weights = load_file(root / "model.safetensors")
    save_file(
        {old(name): tensor for name, tensor in weights.items()}, root / "model.safetensors", {"format": "pt"}
    )
