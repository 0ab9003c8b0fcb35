"""The newer families at real shapes: two whole models of 2B, and the towers of the others on one layer of text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from benchmarks.checkpoints import DEMO, write_weights
from benchmarks.export_size import measure, watch
from benchmarks.export_size import table as size_table
from benchmarks.measure import RESPRUNE
from resprune.runtime.bundle.files import read_bundle

DEMO_MARK = "<image>"
VOCABULARY = 151936
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
SMOLVLM_PROCESSOR = HALF | {
    "image_processor_type": "SmolVLMImageProcessor",
    "size": {"longest_edge": 1536},
    "max_image_size": {"longest_edge": 384},
    "do_image_splitting": True,
    "do_pad": True,
}
PEAK_BAR = 6e9
"""Bytes of memory that an export of 2B, and an answer in 4 bits, should take at most."""


def write_qwen3vl_2b(folder: Path) -> None:
    """All of Qwen3-VL-2B's shapes in bf16, 4.3 GB; images of up to 4,096 tokens."""
    config = Qwen3VLConfig(
        vision_config={
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "patch_size": 16,
            "out_hidden_size": 2048,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        text_config=_text(
            hidden_size=2048,
            intermediate_size=6144,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=VOCABULARY,
            tie_word_embeddings=True,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        ),
        image_token_id=demo_image_token(),
        tie_word_embeddings=True,
    )
    processor = HALF | {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": 16,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 65536, "longest_edge": 4096 * 32 * 32},
    }
    write(folder, Qwen3VLForConditionalGeneration, config, processor)


def write_internvl3_2b(folder: Path) -> None:
    """All of InternVL3-2B's shapes in bf16, 4.2 GB; up to 12 tiles and the thumbnail."""
    config = InternVLConfig(
        vision_config={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": [448, 448],
            "patch_size": [14, 14],
            "attention_bias": True,
        },
        text_config=_text(
            model_type="qwen2",
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            num_key_value_heads=2,
            vocab_size=151674,
            tie_word_embeddings=False,
        ),
        image_token_id=demo_image_token(),
        tie_word_embeddings=False,
    )
    processor = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "crop_to_patches": True,
        "size": {"height": 448, "width": 448},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "min_patches": 1,
        "max_patches": 12,
    }
    write(folder, InternVLForConditionalGeneration, config, processor, mark="<IMG_CONTEXT>")


def write_smolvlm_tower(folder: Path) -> None:
    """SmolVLM2-2.2B's tower and connector, 81 tokens of 2,048 a tile."""
    config = SmolVLMConfig(
        vision_config={key: SIGLIP[key] for key in SIGLIP if key not in ("model_type", "vision_use_head")},
        text_config=one_layer("llama", 2048),
        image_token_id=demo_image_token(),
        scale_factor=3,
        tie_word_embeddings=False,
    )
    write(folder, SmolVLMForConditionalGeneration, config, SMOLVLM_PROCESSOR)


def write_onevision_tower(folder: Path) -> None:
    """LLaVA-OneVision-7B's tower and projector, up to nine tiles of 729 tokens of 3,584 before interpolation."""
    pinpoints = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
    config = LlavaOnevisionConfig(
        vision_config=SIGLIP | {"num_hidden_layers": 26},
        text_config=one_layer("qwen2", 3584),
        image_token_id=demo_image_token(),
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio="anyres_max_9",
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    processor = HALF | {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "size": {"height": 384, "width": 384},
        "image_grid_pinpoints": pinpoints,
        "do_pad": True,
    }
    write(folder, LlavaOnevisionForConditionalGeneration, config, processor)


def write_gemma3_tower(folder: Path) -> None:
    """Gemma 3's tower and projector at 896 pixels, 256 tokens of 2,560."""
    config = Gemma3Config(
        vision_config=SIGLIP | {"image_size": 896},
        text_config=one_layer("gemma3_text", 2560) | {"layer_types": ["full_attention"]},
        image_token_index=demo_image_token(),
    )
    processor = HALF | {
        "image_processor_type": "Gemma3ImageProcessor",
        "size": {"height": 896, "width": 896},
        "resample": 2,
    }
    write(
        folder,
        Gemma3ForConditionalGeneration,
        config,
        processor,
        mark="<image_soft_token>",
        placeholder="<start_of_image>",
    )


MODELS = {"qwen3vl-2b": (write_qwen3vl_2b, "11%", 4.3e9), "internvl3-2b": (write_internvl3_2b, "11%", 4.2e9)}
TOWERS = {
    "smolvlm2-2b": write_smolvlm_tower,
    "llava-onevision-7b": write_onevision_tower,
    "gemma3-4b": write_gemma3_tower,
}
TOWER_DTYPE = "fp32"


def run(work: Path) -> dict[str, Any]:
    """Export the towers and compare them with PyTorch; export the models, ask them; everything is removed again."""
    return {
        "towers": {name: _tower(name, work) for name in TOWERS},
        "models": {name: measure(name, MODELS, work) for name in MODELS},
    }


def _tower(name: str, work: Path) -> dict[str, Any]:
    checkpoint, bundle = work / f"{name}-tower", work / f"{name}-tower-bundle"
    try:
        if not checkpoint.exists():
            TOWERS[name](checkpoint)
        options = ["-k", "11%", "--verify", "layers", "--dtype", TOWER_DTYPE, "--force"]
        exporting = watch([*RESPRUNE, "export", str(checkpoint), str(bundle), *options])
        if exporting["status"]:
            return {"export": exporting}
        opened = read_bundle(bundle, check_hashes=False).manifest
        return {
            "export": exporting,
            "shape": list(opened.graphs["vision_select"].outputs[0].shape),
            "tokens": opened.selection.num_tokens or opened.selection.max_tokens,
            "parity": opened.parity,
        }
    finally:
        for folder in (checkpoint, bundle):
            shutil.rmtree(folder, ignore_errors=True)


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    rows = [
        "| tower and projector | tokens an image, at most | image_features, largest difference | allowed | picks "
        "| exported | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, figures in result["towers"].items():
        export = figures["export"]
        took = f"{export['seconds']:.0f} s | {export['peak_bytes'] / 1e9:.1f} GB"
        if export["status"]:
            rows.append(f"| {name} | status {export['status']} | | | | {took} |")
            continue
        parity = figures["parity"]
        feature = parity["outputs"]["vision_select"]["image_features"]
        rows.append(
            f"| {name} | {figures['tokens']:,} | {feature['max_diff']:.1e} "
            f"| {feature['atol'] * max(1.0, feature['scale']):.1e} "
            f"| {parity['picks']} | {took} |"
        )
    notes = []
    for name, figures in result["models"].items():
        if "skipped" not in figures:
            peak = max(figures[step]["peak_bytes"] for step in ("export", "quantized", "ask"))
            met = "met" if peak <= PEAK_BAR else "missed"
            notes.append(f"{name}: at most {PEAK_BAR / 1e9:g} GB of memory at any step was {met}.")
    return (
        "At real width and depth, with one layer of language; compared with Hugging Face's own code in "
        f"{TOWER_DTYPE}.\n\n"
        + "\n".join(rows)
        + "\n\nWhole models:\n\n"
        + "\n\n".join([size_table(result["models"]), *notes])
    )


def demo_image_token() -> int:
    """The id of the demo's image token."""
    return int(LlavaConfig.from_pretrained(DEMO).image_token_id)


def _text(**shape: Any) -> dict[str, Any]:
    """A language model's config, which ends its answers as the demo does."""
    demo = LlavaConfig.from_pretrained(DEMO).text_config
    ids = {key: getattr(demo, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {"max_position_embeddings": 32768, **shape, **ids}


def one_layer(model_type: str, hidden: int) -> dict[str, Any]:
    """A language model of one layer, for a checkpoint that is about its tower."""
    return _text(
        model_type=model_type,
        hidden_size=hidden,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=hidden // 128,
        num_key_value_heads=1,
        head_dim=128,
        vocab_size=LlavaConfig.from_pretrained(DEMO).text_config.vocab_size,
    )


def write(
    folder: Path,
    model_class: Any,
    config: Any,
    processor: dict[str, Any],
    *,
    mark: str = DEMO_MARK,
    placeholder: str | None = None,
) -> None:
    """A checkpoint with random weights and the demo's tokenizer, whose image token is called `mark`."""
    write_weights(folder, model_class, config, dtype=torch.bfloat16)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (DEMO / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace(DEMO_MARK, mark), encoding="utf-8")
    template = (DEMO / "chat_template.jinja").read_text(encoding="utf-8")
    template = template.replace(DEMO_MARK, placeholder or mark)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    shutil.copy(DEMO / "generation_config.json", folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))
