"""Side files of every age of checkpoint."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlavaProcessor

from resprune.exporter.checkpoint.checkpoint import resolve
from resprune.exporter.checkpoint.side_files import (
    COPIED,
    chat_template,
    check_side_files,
    copy_side_files,
    image_processor_config,
    read_tokenizer,
)
from resprune.runtime.bundle.files import Bundle, describe_files
from resprune.runtime.errors import ResPruneError
from resprune.runtime.prompt import template
from tests.runtime.bundles import MANIFEST
from tests.tiny import CHAT_TEMPLATE, VARIANTS


def copy(root: Path, bundle: Path) -> None:
    checkpoint = resolve(str(root))
    copy_side_files(checkpoint, read_tokenizer(checkpoint), bundle)


@pytest.mark.parametrize("variant", VARIANTS)
def test_side_files_of_every_age(variant, tiny_checkpoint, tmp_path):
    copy(tiny_checkpoint(variant), tmp_path)
    written = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "preprocessor_config.json"} <= written
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert processor["image_processor_type"].endswith("ImageProcessor")
    own = VARIANTS[variant].template is not None
    expected = CHAT_TEMPLATE if own else template.DEFAULT_TEMPLATE
    assert (tmp_path / "chat_template.jinja").read_text() == expected


ONE, SEVERAL = "{}", '{{"default": {}, "rag": "R"}}'  # of a JSON file
PLACES = {"chat_template.jinja": "J", "chat_template.json": "L", "processor_config.json": "P"}


@pytest.mark.parametrize("form", [ONE, SEVERAL], ids=["one", "several"])
@pytest.mark.parametrize("names", [names for n in (1, 2, 3) for names in itertools.combinations(PLACES, n)])
def test_the_chat_template_is_the_one_that_transformers_takes(names, form, tiny_checkpoint, tmp_path):
    """Of a checkpoint that has several, and of the bundle that is made of it."""
    root = shutil.copytree(tiny_checkpoint("dinov2-qwen2"), tmp_path / "checkpoint")
    for name in names:
        text = PLACES[name]
        if name.endswith(".json"):
            config = json.loads((root / name).read_text()) if (root / name).exists() else {}
            value = json.loads(form.format(json.dumps(text)))
            text = json.dumps(config | {"chat_template": value})
        (root / name).write_text(text)
    config, _ = LlavaProcessor.get_processor_dict(root)
    expected = config["chat_template"]
    if isinstance(expected, dict):
        expected = expected["default"]
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    copy(root, bundle)
    assert chat_template(resolve(str(root))) == expected
    manifest = replace(MANIFEST, files=describe_files(bundle))
    assert template.chat_template(Bundle(bundle, manifest)) == expected


def test_a_token_that_only_the_tokenizers_config_names(tiny_checkpoint, tmp_path):
    """tokenizer.json is written as transformers reads the checkpoint, so that the runtime's ids are the same."""
    root = shutil.copytree(tiny_checkpoint("clip-llama"), tmp_path / "checkpoint")
    config = json.loads((root / "tokenizer_config.json").read_text()) | {"extra_special_tokens": ["<region>"]}
    (root / "tokenizer_config.json").write_text(json.dumps(config))
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    copy(root, bundle)
    text = "USER: <image>\nwhat is the <region> ASSISTANT:"
    expected = AutoTokenizer.from_pretrained(root)(text).input_ids
    assert Tokenizer.from_file(str(bundle / "tokenizer.json")).encode(text).ids == expected
    assert Tokenizer.from_file(str(root / "tokenizer.json")).encode(text).ids != expected, "shows nothing"


@pytest.mark.parametrize("nested", [[1], None, "CLIPImageProcessor"])
def test_an_image_processor_is_nested_where_it_is_an_object(nested, tiny_checkpoint, tmp_path):
    """As the runtime and transformers have it, for which null is none."""
    root = shutil.copytree(tiny_checkpoint("clip-llama"), tmp_path / "checkpoint")
    config = json.loads((root / "processor_config.json").read_text())
    (root / "processor_config.json").write_text(json.dumps(config | {"image_processor": nested}))
    settings = json.loads((root / "preprocessor_config.json").read_text())
    assert image_processor_config(resolve(str(root))) == settings


BROKEN = {name: (name, b"{", f"{name} is not valid JSON") for name in COPIED if name.endswith(".json")} | {
    "no tokenizer": ("tokenizer.json", b"{}", r"tokenizer\.json is not a tokenizer"),
    "part of a tokenizer": (
        "tokenizer.json",
        b'{"version": "1.0", "model": 7}',
        r"tokenizer\.json is not a tokenizer",
    ),
    "tokenizer's class": (
        "tokenizer_config.json",
        b'{"extra_special_tokens": 7}',
        r"tokenizer_config\.json makes no",
    ),
    "tokenizer's length": (
        "tokenizer_config.json",
        b'{"model_max_length": "x"}',
        r"tokenizer_config\.json makes no",
    ),
    "chat template": ("chat_template.jinja", b"\xff", r"chat_template\.jinja is not text in UTF-8"),
}


@pytest.mark.parametrize(("name", "content", "sentence"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_file_is_named_before_anything_is_written(
    name, content, sentence, tiny_checkpoint, tmp_path
):
    root = shutil.copytree(tiny_checkpoint("clip-llama"), tmp_path / "checkpoint")

    def check() -> None:
        checkpoint = resolve(str(root))
        check_side_files(checkpoint)
        read_tokenizer(checkpoint)

    check()
    (root / name).write_bytes(content)
    with pytest.raises(ResPruneError, match=sentence) as told:
        check()
    assert "\n" not in str(told.value)
    assert "download" in str(told.value)
