"""What the runtime could not ask with never becomes a bundle; what it can, it asks as transformers does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from resprune.exporter.checkpoint.checkpoint import family_of, resolve
from resprune.exporter.checkpoint.draft import write_draft
from resprune.exporter.checkpoint.side_files import check_side_files, read_template
from resprune.exporter.checkpoint.weightless import fake_mode
from resprune.exporter.export import export
from resprune.exporter.families import split_model
from resprune.exporter.options import Options
from resprune.exporter.selection import selection_of
from resprune.method import SettingError, Settings
from resprune.runtime.bundle.files import Bundle, read_bundle
from resprune.runtime.errors import ResPruneError
from resprune.runtime.prompt.prompter import Prompter
from resprune.runtime.sampling import eos_token_ids
from tests.tiny_qwen import CHAT_TEMPLATE

TEXT_ONLY = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] + '<|im_end|>' }}{% endfor %}"
)


def draft(root: Path, out: Path) -> Bundle:
    checkpoint = resolve(str(root))
    family = family_of(checkpoint)
    check_side_files(checkpoint)
    out.mkdir()
    components = split_model(checkpoint, torch.float32, fake_mode())
    every = selection_of(Settings(share=1.0), family, components, counts=False)
    return write_draft(checkpoint, components, every, out)


def test_a_selection_says_what_is_wrong_of_it(tiny_checkpoint):
    checkpoint = resolve(str(tiny_checkpoint("clip-llama")))
    family, components = family_of(checkpoint), split_model(checkpoint, torch.float32, fake_mode())
    with pytest.raises(
        ResPruneError, match="-k 17 is more than the 16 visual tokens of an image; give 1 to 16"
    ):
        selection_of(Settings(k=17), family, components, counts=False)
    for wrong in (Settings(k=4, alpha=-1.0), Settings(k=4, scale="zz")):
        with pytest.raises(SettingError, match=r"(alpha|scale) should be"):
            selection_of(wrong, family, components, counts=False)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    table = json.loads(path.read_text()) if path.exists() else {}
    change(table)
    path.write_text(json.dumps(table))


@pytest.mark.parametrize("variant", ["clip-llama", "dinov2-qwen2", "next-qwen2", "qwen25", "qwen2"])
def test_every_family_is_asked_as_transformers_does(variant, tiny_checkpoint, tmp_path):
    bundle = draft(tiny_checkpoint(variant), tmp_path / "out")
    assert eos_token_ids(bundle)
    assert Prompter(bundle).prompt("why?", 2).ids.count(bundle.manifest.image_token_id) == 2


def no_end(root: Path) -> None:
    """A Llama's text_config leaves eos_token_id out where it is the class's default."""
    (root / "generation_config.json").unlink()
    edit(root / "config.json", lambda c: (c.pop("eos_token_id", 0), c["text_config"].pop("eos_token_id", 0)))


def end(value: object) -> Callable[[Path], None]:
    return lambda root: edit(root / "generation_config.json", lambda c: c.update(eos_token_id=value))


def image_token(value: object) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        edit(root / "config.json", lambda c: (c.pop("image_token_index", 0), c.update(image_token_id=value)))

    return spoil


def template(text: str) -> Callable[[Path], object]:
    return lambda root: (root / "chat_template.jinja").write_text(text)


SPOILED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no end token": ("clip-llama", no_end, r"names no token that ends an answer; .*the tokenizer's own is 2"),
    "words for ends": ("clip-llama", end(["x"]), r"eos_token_id in .* is \['x'\], and the model has tokens"),
    "an end past the table": ("clip-llama", end([2, 10**6]), r"eos_token_id in .* is \[2, 1000000\]"),
    "a yes for an end": ("clip-llama", end(True), "eos_token_id in .* is True"),
    "an image token past the tokenizer": ("clip-llama", image_token(2**20), "which the tokenizer does not have"),
    "an image token that is a word": ("clip-llama", image_token(300), "takes the image token .* apart"),
    "a template with no image": ("clip-llama", template("hello"), "gave no <image> .* --chat-template FILE"),
    "a template of one image": (
        "clip-llama",
        template("<image>{{ messages[0].content[-1].text }}"),
        "a prompt with two images cannot be made of .*; give another with --chat-template FILE",
    ),
    "a template of one turn": (
        "clip-llama",
        template("{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}"
                 "{% for part in messages[0].content %}{{ '<image>' if part.type == 'image' else part.text }}"
                 "{% endfor %}"),
        "a prompt with a second turn cannot be made of .*one turn",
    ),
    "no template": (
        "qwen2",
        lambda root: (root / "chat_template.jinja").unlink(),
        "has no chat template, and its prompt cannot be guessed; .*--chat-template FILE",
    ),
    "no template for tiles": (
        "next-llama",
        lambda root: (root / "chat_template.jinja").unlink(),
        "has no chat template",
    ),
    "a text-only template": ("qwen25", template(TEXT_ONLY), "cannot be made of .*--chat-template FILE"),
}  # fmt: skip


@pytest.mark.parametrize(("variant", "spoil", "sentence"), SPOILED.values(), ids=SPOILED.keys())
def test_what_could_never_be_asked_is_refused(variant, spoil, sentence, tiny_checkpoint, tmp_path):
    root = shutil.copytree(tiny_checkpoint(variant), tmp_path / "checkpoint")
    spoil(root)
    with pytest.raises(ResPruneError, match=sentence) as told:
        draft(root, tmp_path / "out")
    assert "\n" not in str(told.value)


def test_a_prompt_unlike_transformers_is_refused(tiny_checkpoint, tmp_path, monkeypatch):
    made = Prompter._render
    monkeypatch.setattr(Prompter, "_render", lambda *arguments: made(*arguments) + " ")
    with pytest.raises(ResPruneError, match="would not be the one of transformers"):
        draft(tiny_checkpoint("clip-llama"), tmp_path / "out")


def test_a_template_of_ones_own(tiny_checkpoint, tmp_path):
    """It takes the place of every template that the checkpoint has, in the bundle as well."""
    root = shutil.copytree(tiny_checkpoint("qwen2"), tmp_path / "checkpoint")
    (root / "chat_template.jinja").unlink()
    edit(root / "processor_config.json", lambda config: config.update(chat_template=TEXT_ONLY))
    file = tmp_path / "mine.jinja"
    file.write_text(CHAT_TEMPLATE)
    export(str(root), tmp_path / "bundle", Options(k=3, chat_template=file))
    bundle = read_bundle(tmp_path / "bundle")
    whole = draft(tiny_checkpoint("qwen2"), tmp_path / "whole")
    assert Prompter(bundle).prompt("why?", 1).ids == Prompter(whole).prompt("why?", 1).ids


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "is not a file"),
        (b"", "is empty"),
        (b"\xff", "not text in UTF-8"),
        (b"version https://git-lfs", "Git LFS"),
    ],
)
def test_a_template_that_is_none(content, sentence, tmp_path):
    if content is not None:
        (tmp_path / "t.jinja").write_bytes(content)
    with pytest.raises(ResPruneError, match=sentence):
        read_template(tmp_path / "t.jinja")


def test_the_tokens_of_special_tokens_map_reach_the_template(tiny_checkpoint, tmp_path):
    """Older checkpoints have them there alone; without, the prompt loses its BOS."""
    root = shutil.copytree(tiny_checkpoint("clip-llama"), tmp_path / "checkpoint")
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    edit(root / "tokenizer_config.json", lambda config: [config.pop(name) for name in names])
    tokens = {
        name: {"content": text} for name, text in zip(names, ("<s>", "</s>", "<unk>", "<pad>"), strict=True)
    }
    (root / "special_tokens_map.json").write_text(json.dumps(tokens))
    bundle = draft(root, tmp_path / "out")
    expected = AutoTokenizer.from_pretrained(root).special_tokens_map
    assert expected["bos_token"] == "<s>"
    variables = Prompter(bundle).variables
    assert {name: variables[name] for name in expected} == expected
    assert Prompter(bundle).prompt("why?", 1).text.startswith("<s>")
