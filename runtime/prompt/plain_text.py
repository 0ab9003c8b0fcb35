"""Questions as plain text: special tokens that a user typed are encoded like any other words.

As in Hugging Face, `</s>` or `<|im_end|>` in a question is the control token: the tokenizer looks for special tokens in
the whole prompt and cannot tell the template's from the user's. Here the user's are set apart before the template is
rendered. The template's get names that nobody types, which a copy of the tokenizer knows. Both are encoded in one text,
so what stands around a word makes the same tokens as ever.
"""

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from resprune.runtime.errors import ResPruneError

if TYPE_CHECKING:
    import tokenizers

# Unicode noncharacters, which no text carries: around the number of a special token of the template, and of the user.
_OURS, _TYPED = "\ufdd2{}\ufdd3", "\ufdd4{}\ufdd5"
_IN_TEXT = re.compile("\ufdd4([0-9]+)\ufdd5")
_IN_PROMPT = re.compile("\ufdd2([0-9]+)\ufdd3")

Encoded = tuple[list[int], list[tuple[int, int]]]
"""Ids, and for each the characters (start, end) it was made from."""


class PlainText:
    """Sets typed special tokens apart.

    Use, in this order: `hidden` for every text of the user's, `written` for the rendered prompt, `encode` for what
    `written` gave, and `shown` for that as a reader should see it.
    """

    def __init__(self, tokenizer: "tokenizers.Tokenizer", placeholders: Iterable[str] = ()) -> None:
        """`placeholders`: what a template writes for an image, which is set apart too."""
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().values()
        names = {token.content for token in added if token.special} | set(placeholders)
        self._names = sorted(
            names, key=lambda name: (-len(name), name)
        )  # of two that begin alike the longer first
        self._pattern = re.compile("|".join(map(re.escape, self._names)) or "(?!)")
        self._numbers = {name: number for number, name in enumerate(self._names)}

    def types_special(self, texts: Sequence[str]) -> bool:
        """Whether a special token stands in one of the texts; if not, nothing needs to be set apart."""
        return any(self._pattern.search(text) for text in texts)

    def hidden(self, text: str) -> str:
        """A user's text with the special tokens in it out of the template's and the tokenizer's sight."""
        return self._pattern.sub(lambda found: _TYPED.format(self._numbers[found[0]]), text)

    def written(self, rendered: str) -> str:
        """The rendered prompt: the template's special tokens renamed, the user's as they were typed."""
        renamed = self._pattern.sub(lambda found: _OURS.format(self._numbers[found[0]]), rendered)
        return _IN_TEXT.sub(lambda found: self._names[int(found[1])], renamed)

    def shown(self, written: str) -> str:
        """The prompt with the template's special tokens under their own names."""
        return _IN_PROMPT.sub(lambda found: self._names[int(found[1])], written)

    def encode(self, written: str, *, add_special_tokens: bool) -> Encoded:
        """Ids and offsets; `add_special_tokens` as the tokenizer's own `encode` takes it."""
        copy, ids = self._copy
        encoding = copy.encode(written, add_special_tokens=False)
        before, after = self._around if add_special_tokens else ([], [])
        offsets = [(0, 0)] * len(before) + list(encoding.offsets) + [(0, 0)] * len(after)
        return before + [ids.get(token, token) for token in encoding.ids] + after, offsets

    @cached_property
    def _copy(self) -> "tuple[tokenizers.Tokenizer, dict[int, int]]":
        """The tokenizer with its special tokens renamed, and the ids of its added tokens → those of the original."""
        import tokenizers

        settings = json.loads(self._tokenizer.to_str())
        originals: dict[str, int] = {}
        for token in settings["added_tokens"]:
            if token["content"] in self._numbers:
                token["content"] = _OURS.format(self._numbers[token["content"]])
            originals[token["content"]] = token["id"]
        settings["truncation"] = settings["padding"] = None
        copy = tokenizers.Tokenizer.from_str(json.dumps(settings))
        ids = {copy.token_to_id(name): original for name, original in originals.items()}
        return copy, {renamed: original for renamed, original in ids.items() if renamed is not None}

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """The ids that the tokenizer adds before and after a text, such as BOS."""
        bare = self._tokenizer.encode("a", add_special_tokens=False).ids
        full = self._tokenizer.encode("a", add_special_tokens=True).ids
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
        raise ResPruneError(
            "the tokenizer adds special tokens in the middle of a text; ask without plain text"
        )
