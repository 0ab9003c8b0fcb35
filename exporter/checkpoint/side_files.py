"""The checkpoint's small files that a bundle carries: config, tokenizer, chat template, image processor."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from resprune.exporter.checkpoint.checkpoint import Checkpoint
from resprune.exporter.checkpoint.files import read_small, refuse_pointer
from resprune.runtime.errors import ResPruneError, one_line, tokenizer_panics
from resprune.runtime.families.table import FAMILIES
from resprune.runtime.prompt.template import DEFAULT_TEMPLATE, TEMPLATE_FILE, find_template
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


SPECIAL_TOKENS = "special_tokens_map.json"


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
    for name in (*COPIED, SPECIAL_TOKENS):
        if name.endswith(".json"):
            checkpoint.json(name)
    settings = checkpoint.json(SETTINGS_FILE)
    require_supported(settings)
    checkpoint_sampling(settings)
    chat_template(checkpoint)


def copy_side_files(checkpoint: Checkpoint, tokenizer: Any, destination: Path) -> None:
    """Copy what is there, and give the image processor, special tokens and chat template the files of their own.

    `tokenizer` is transformers', as `read_tokenizer` gives it.
    """
    for name in COPIED:
        if (checkpoint.root / name).is_file():
            # A copy, also of what the hub's cache has as a link: a bundle may not point outside itself.
            shutil.copyfile(checkpoint.root / name, destination / name)
    tokenizer.backend_tokenizer.save(str(destination / "tokenizer.json"))
    # As text by their names, whichever of the checkpoint's files had them: all that a template is given.
    write_json(destination / SPECIAL_TOKENS, tokenizer.special_tokens_map)
    processor = image_processor_config(checkpoint)
    write_json(destination / "preprocessor_config.json", processor)
    whole = checkpoint.json("processor_config.json")
    if whole:
        whole.pop("chat_template", None)  # it would go before the file of its own
        nested = {"image_processor": processor} if "image_processor" in whole else {}
        write_json(destination / "processor_config.json", whole | nested)
    (destination / TEMPLATE_FILE).write_text(chat_template(checkpoint), encoding="utf-8")


def read_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer of transformers, a `PreTrainedTokenizerFast`; `ResPruneError` if its files are broken.

    Some classes put other parts in place of the file's, and a token may stand in tokenizer_config.json alone.
    transformers looks into config.json first, so that this should have been parsed.
    """
    path = checkpoint.root / "tokenizer.json"
    try:
        with tokenizer_panics(f"{path} is not a tokenizer"):
            Tokenizer.from_file(str(path))
    except ResPruneError:
        raise
    except Exception as error:  # the tokenizers package raises nothing more particular
        raise ResPruneError(f"{path} is not a tokenizer ({_reason(error)}); download it again") from None
    try:
        with tokenizer_panics(f"{path} is not a tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(checkpoint.root, local_files_only=True)
            tokenizer("a")  # which reads settings that the constructor only keeps
    except ResPruneError:
        raise
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


def chat_template(checkpoint: Checkpoint) -> str:
    """The chat template, from wherever this age of checkpoint keeps it, or the family's own where there is none.

    `ResPruneError` if the family has none of its own: another model's prompt gives answers that look like answers.
    """
    if checkpoint.template is not None:
        return checkpoint.template
    file = checkpoint.root / TEMPLATE_FILE
    if file.is_file():
        refuse_pointer(file)
    found = find_template(checkpoint.json, file if file.is_file() else None)
    if found is not None:
        return found
    if not FAMILIES[checkpoint.config["model_type"]].plain_prompt:
        raise ResPruneError(
            f"{checkpoint.root} has no chat template, and its prompt cannot be guessed; take {TEMPLATE_FILE} from the "
            "checkpoint that it was trained from, or give it with --chat-template FILE"
        )
    return DEFAULT_TEMPLATE


def read_template(path: Path) -> str:
    """A chat template that the user gives; `ResPruneError` for a file that is none."""
    if not os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises for a name that is too long
        raise ResPruneError(f"--chat-template {path} is not a file; give one with a chat template in Jinja")
    try:
        template = read_small(path).decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ResPruneError(f"{path} is not text in UTF-8 ({error}); give a chat template in Jinja") from None
    if not template.strip():
        raise ResPruneError(f"{path} is empty; give a chat template in Jinja")
    return template
