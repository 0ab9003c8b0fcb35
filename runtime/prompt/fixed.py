"""A fixed question as one JSON object: what a device without tokenizer, template and Python needs to ask it."""

from collections.abc import Sequence
from typing import Any

from resprune.runtime.arguments import flag, whole
from resprune.runtime.bundle.files import Bundle
from resprune.runtime.families.table import family_of
from resprune.runtime.prompt.pieces import vocabulary_pieces
from resprune.runtime.prompt.prompter import Prompter
from resprune.runtime.sampling import eos_token_ids

PROMPT_FORMAT = 1


def fixed_prompt(
    bundle: Bundle,
    question: str,
    *,
    images: int = 1,
    about: Sequence[str] | None = None,
    plain_text: bool = False,
) -> dict[str, Any]:
    """The prompt of `question` about `images` images, as JSON values (docs/node.md, "prompt.json").

    `about` names the keywords, and `plain_text` takes special tokens as text, as in `Pipeline.ask`. Raises
    `ResPruneError` for a question that cannot be asked, or fewer images than one.
    """
    manifest = bundle.manifest
    whole(images, "images", 1, manifest.context_length)
    prompter = Prompter(bundle)
    prompt = prompter.prompt(question, images, about=about, plain_text=flag(plain_text, "plain_text"))
    return {
        "format_version": PROMPT_FORMAT,
        "question": question,
        "text": prompt.text,
        "ids": prompt.ids,
        "image_places": [place for place, token in enumerate(prompt.ids) if token == manifest.image_token_id],
        "keywords": prompt.nouns,
        "keyword_places": prompt.text_positions,
        "keyword_ids": prompt.text_token_ids,
        "positions": manifest.positions,
        "position_axes": family_of(bundle).position_axes,
        "stop_ids": sorted(eos_token_ids(bundle)),
        "tokenizer_sha256": manifest.files["tokenizer.json"].sha256,
        "pieces": vocabulary_pieces(prompter.tokenizer),
    }
