"""The checkpoint's small files that a bundle carries: config, tokenizer, chat template, image processor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from resprune.exporter.checkpoint.checkpoint import Checkpoint
from resprune.runtime.errors import ResPruneError, one_line
from resprune.runtime.prompt.template import TEMPLATE_FILE, find_template
from resprune.runtime.sampling import SETTINGS_FILE, checkpoint_sampling, require_supported

COPIED = (
    "config.json",
    SETTINGS_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    TEMPLATE_FILE,
    "preprocessor_config.json",
    "processor_config.json",
)


def image_processor_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The image processor's settings; transformers 5 keeps them inside processor_config.json, and that goes first."""
    settings = checkpoint.json("processor_config.json").get("image_processor")
    if not settings or not isinstance(settings, dict):
        settings = checkpoint.json("preprocessor_config.json")
    return settings and settings | checkpoint.image_processor


def check_side_files(checkpoint: Checkpoint) -> None:
    """`ResPruneError` if the checkpoint lacks what the runtime cannot do without, or has a file that does not parse."""
    if not (checkpoint.root / "tokenizer.json").is_file():
        raise ResPruneError(
            f"{checkpoint.root} has no tokenizer.json; write one with "
            "AutoTokenizer.from_pretrained(…).save_pretrained(…)"
        )
    if not image_processor_config(checkpoint):
        raise ResPruneError(
            f"{checkpoint.root} has no preprocessor_config.json; copy it from the original checkpoint"
        )
    for name in COPIED:
        if name.endswith(".json"):
            checkpoint.json(name)
    settings = checkpoint.json(SETTINGS_FILE)
    require_supported(settings)
    checkpoint_sampling(settings)
    chat_template(checkpoint)


def copy_side_files(checkpoint: Checkpoint, tokenizer: Tokenizer, destination: Path) -> None:
    """Copy what is there, and give the image processor and the chat template the files of their own."""
    for name in COPIED:
        if (checkpoint.root / name).is_file():
            # A copy, also of what the hub's cache has as a link: a bundle may not point outside itself.
            shutil.copyfile(checkpoint.root / name, destination / name)
    tokenizer.save(str(destination / "tokenizer.json"))
    processor = image_processor_config(checkpoint)
    write_json(destination / "preprocessor_config.json", processor)
    whole = checkpoint.json("processor_config.json")
    if checkpoint.image_processor and "image_processor" in whole:
        write_json(destination / "processor_config.json", whole | {"image_processor": processor})
    template = chat_template(checkpoint)
    if template is not None:
        (destination / TEMPLATE_FILE).write_text(template, encoding="utf-8")


def read_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """tokenizer.json as transformers reads it; `ResPruneError` if it is broken.

    Some classes put other parts in place of the file's, and a token may stand in tokenizer_config.json alone.
    transformers looks into config.json first, so that this should have been parsed.
    """
    path = checkpoint.root / "tokenizer.json"
    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers package raises nothing more particular
        raise ResPruneError(f"{path} is not a tokenizer ({_reason(error)}); download it again") from None
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(
            checkpoint.root, local_files_only=True
        ).backend_tokenizer
    except Exception as error:  # any, of the class that the file names
        raise ResPruneError(
            f"{checkpoint.root / 'tokenizer_config.json'} makes no tokenizer of tokenizer.json ({_reason(error)}); "
            "download both again"
        ) from None
    return tokenizer


def _reason(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """A JSON file as Hugging Face lays one out, but for a line break at its end."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def chat_template(checkpoint: Checkpoint) -> str | None:
    """The chat template, from wherever this age of checkpoint keeps it; None if there is none."""
    file = checkpoint.root / TEMPLATE_FILE
    return find_template(checkpoint.json, file if file.is_file() else None)
