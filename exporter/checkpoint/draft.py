"""A bundle before it has graphs: its files are written, and the runtime's prompts are compared with transformers'.

What the runtime could not ask with is found here, before the first graph is traced.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from resprune.exporter.checkpoint.checkpoint import Checkpoint, family_of
from resprune.exporter.checkpoint.side_files import copy_side_files, read_tokenizer
from resprune.exporter.components import Components
from resprune.method import Selection
from resprune.names import VISION_SELECT
from resprune.runtime.bundle.files import Bundle, describe_files
from resprune.runtime.bundle.manifest import FORMAT_VERSION, GraphSpec, Manifest
from resprune.runtime.errors import ResPruneError
from resprune.runtime.prompt.messages import Message, Turn
from resprune.runtime.prompt.prompter import Prompter
from resprune.runtime.prompt.template import as_string

QUESTION, ANSWER = "What is in this image?", "A cat on a table."
PROMPTS: dict[str, tuple[int, tuple[Turn, ...]]] = {
    "one image": (1, ()),
    "two images": (2, ()),
    "a second turn": (1, (Turn(QUESTION, ANSWER),)),
    "two images and a second turn": (2, (Turn(QUESTION, ANSWER),)),
}


def write_draft(checkpoint: Checkpoint, components: Components, selection: Selection, root: Path) -> Bundle:
    """Write what a bundle has beside its graphs into the directory `root`; the bundle that it is.

    `ResPruneError` for a tokenizer, image token, end token or chat template that the runtime could not use, and where
    its prompts would be others than those of transformers.
    """
    tokenizer = read_tokenizer(checkpoint)
    model: Any = components.model
    vocabulary = int(model.config.get_text_config().vocab_size)
    _check_image_token(checkpoint, tokenizer, components.image_token_id)
    _check_end_tokens(checkpoint, tokenizer, vocabulary)
    copy_side_files(checkpoint, tokenizer, root)
    family = family_of(checkpoint)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        family=family.name,
        model=checkpoint.name,
        revision=checkpoint.revision,
        selection=selection,
        positions=family.policy(None),
        image_token_id=components.image_token_id,
        context_length=components.context_length,
        # A preprocessor asks this graph for the windows of its tower.
        graphs={VISION_SELECT: GraphSpec("", "fp32", (), ())},
        files=describe_files(root),
        versions={},
        command="",
        parity={},
        created="",
    )
    bundle = Bundle(root, manifest)
    _check_prompts(checkpoint, bundle, tokenizer, vocabulary, plain=family.plain_prompt)
    return bundle


def _check_image_token(checkpoint: Checkpoint, tokenizer: Any, image_token_id: object) -> None:
    """A prompt has exactly one id for each image, which no text makes."""
    config = checkpoint.root / "config.json"
    token = None
    if isinstance(image_token_id, int) and 0 <= image_token_id < 1 << 31:
        token = tokenizer.backend_tokenizer.id_to_token(image_token_id)
    if token is None:
        raise ResPruneError(
            f"the image token of {config} is {image_token_id!a:.80}, which the tokenizer does not have; they "
            "belong to different models"
        )
    if tokenizer.backend_tokenizer.encode(token, add_special_tokens=False).ids != [image_token_id]:
        raise ResPruneError(
            f"the tokenizer takes the image token {token} of {config} apart; it should be one of added_tokens in "
            "tokenizer.json"
        )


def _check_end_tokens(checkpoint: Checkpoint, tokenizer: Any, vocabulary: int) -> None:
    """An answer must be able to end: an id that the model can give, where the runtime looks for one."""
    generation = checkpoint.json("generation_config.json")
    text = checkpoint.config.get("text_config")
    tables = (generation, checkpoint.config, text if isinstance(text, dict) else {})
    found = next(
        (table["eos_token_id"] for table in tables if table.get("eos_token_id") not in (None, [])), None
    )
    own = tokenizer.eos_token_id
    way = "write it into generation_config.json as eos_token_id"
    if own is not None:
        way += f" (the tokenizer's own is {own})"
    if found is None:
        raise ResPruneError(f"{checkpoint.root} names no token that ends an answer; {way}")
    ids = found if isinstance(found, list) else [found]
    if not all(type(each) is int and 0 <= each < vocabulary for each in ids):
        raise ResPruneError(
            f"eos_token_id in {checkpoint.root} is {found!a:.80}, and the model has tokens from 0 to "
            f"{vocabulary - 1}; {way}"
        )


def _check_prompts(
    checkpoint: Checkpoint, bundle: Bundle, tokenizer: Any, vocabulary: int, *, plain: bool
) -> None:
    """The runtime's prompts, id by id, against what transformers makes of the same conversations."""
    prompter = Prompter(bundle)
    for what, (images, history) in PROMPTS.items():
        try:
            prompt = prompter.prompt(QUESTION, images, history=history)
        except ResPruneError as error:
            reason = str(error).removesuffix("; correct its template")
            raise ResPruneError(
                f"a prompt with {what} cannot be made of {checkpoint.root}: {reason}; give another with "
                "--chat-template FILE"
            ) from None
        expected = _by_transformers(prompt.messages, prompter, tokenizer, images, plain=plain)
        if prompt.ids != expected:
            raise ResPruneError(
                f"a prompt with {what} of {checkpoint.root} would not be the one of transformers; give a template that "
                "both read alike with --chat-template FILE"
            )
        past = [each for each in prompt.ids if each >= vocabulary and each != bundle.manifest.image_token_id]
        if past:
            raise ResPruneError(
                f"the prompt's token {tokenizer.convert_ids_to_tokens(past[0])!r} has id {past[0]} and the model has "
                f"tokens up to {vocabulary - 1}; tokenizer.json in {checkpoint.root} belongs to another model"
            )


def _by_transformers(
    messages: list[Message], prompter: Prompter, tokenizer: Any, images: int, *, plain: bool
) -> list[int] | None:
    """The ids as transformers' processor makes them of a template: rendered, then encoded with one BOS at most."""
    image_token, placeholder = prompter.variables["image_token"], prompter.placeholder
    strings = [as_string(message, placeholder) for message in messages]
    for form in (messages, strings) if plain else (messages,):
        try:
            text = tokenizer.apply_chat_template(
                form,
                chat_template=prompter.template,
                image_token=image_token,
                add_generation_prompt=True,
                tokenize=False,
            )
        except Exception:  # noqa: S112 - a template that is made for the other form
            continue
        if text.count(placeholder) == images:
            text = text.replace(placeholder, image_token)  # images without their expansions, here and there
            has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
            ids: list[int] = tokenizer(text, add_special_tokens=not has_bos).input_ids
            return ids
    return None
