"""From a conversation to token ids, and to the ids that guide the selection: those of the question's nouns."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from resprune.runtime.arguments import text as require_text
from resprune.runtime.arguments import words
from resprune.runtime.bundle.files import Bundle
from resprune.runtime.errors import ResPruneError, one_line, tokenizer_panics
from resprune.runtime.families.table import family_of
from resprune.runtime.prompt.messages import Message, Turn, as_messages, user_message
from resprune.runtime.prompt.nouns import question_terms, split_keywords
from resprune.runtime.prompt.plain_text import PlainText
from resprune.runtime.prompt.template import chat_template, render

if TYPE_CHECKING:
    import tokenizers

    from resprune.runtime.prompt.splice import Ints

# Unicode noncharacters: no text carries them, so they show where a template puts the question.
_NONCHARACTERS = re.compile("[\ufdd0-\ufdef]")
_QUESTION_START, _QUESTION_END = "\ufdd0", "\ufdd1"
# Unicode's sign for an object in a text, where a question goes on after an image: it is in no word.
_BETWEEN_TEXTS = "\ufffc"

_PROBE = 'is "A" in\n <b>?'
"""A question with what templates change: capitals, quotes, white space, and what HTML escapes."""
LONGEST_TOKEN = 256
"""Characters: longer ones than those of any vocabulary, so that a text of so many a token is certainly too long."""


@dataclass(frozen=True)
class Prompt:
    """A prompt ready for the model.

    `messages` is the conversation and `text` what the chat template makes of it, with the expansions of its images;
    `ids` have one image token for each span of each image; `text_positions` are the indices into `ids` of tokens whose
    characters overlap a keyword of the last question; `nouns` are those keywords; `further_ids` are the tokens of
    keywords that the caller named and the question does not have. `adds_special_tokens` says whether the tokenizer
    added its own, which it does unless the template writes the first of them itself. `plain_text`: special tokens stand
    in the text that are not among the ids, so that encoding the text again gives others.
    """

    messages: list[Message]
    text: str
    ids: list[int]
    text_positions: list[int]
    nouns: list[str]
    further_ids: list[int] = field(default_factory=list)
    adds_special_tokens: bool = True
    plain_text: bool = False

    @property
    def text_token_ids(self) -> list[int]:
        """The ids that guide the selection, as they stand in the prompt."""
        return [self.ids[position] for position in self.text_positions] + self.further_ids

    def ids_to_embed(self, image_token_id: int) -> "Ints":
        """`ids` [S] with 0 for each image token: a checkpoint's table may end before it, and its row is never used."""
        ids = np.array(self.ids, dtype=np.int64)
        ids[ids == image_token_id] = 0
        return ids


class Prompter:
    """Writes prompts with a bundle's tokenizer and chat template; ids are those of the Hugging Face processor."""

    def __init__(self, bundle: Bundle) -> None:
        self.tokenizer = load_tokenizer(bundle)
        self.template = chat_template(bundle)
        self._context_length = bundle.manifest.context_length
        family = family_of(bundle)
        self._plain = family.plain_prompt
        self.image_token_id = bundle.manifest.image_token_id
        with tokenizer_panics(f"{bundle.root} has no tokenizer that can be used"):
            image_token = self.tokenizer.id_to_token(self.image_token_id)
        if image_token is None:
            raise ResPruneError(
                f"the tokenizer has no token {self.image_token_id}, the image token; export the bundle again"
            )
        self.variables = _special_tokens(bundle) | {"image_token": image_token}
        self.placeholder = family.placeholder or image_token
        """What the chat template writes for an image."""

    def prompt(
        self,
        question: str,
        images: int,
        *,
        history: Sequence[Turn] = (),
        about: Sequence[str] | None = None,
        expansions: Sequence[str | None] | None = None,
        plain_text: bool = False,
    ) -> Prompt:
        """Prompt for a question about a number of `images`, which stand at the head of the first turn.

        The other arguments as in `conversation`, and what it raises.
        """
        return self.conversation(
            as_messages(question, images, history), about=about, expansions=expansions, plain_text=plain_text
        )

    def conversation(
        self,
        messages: Sequence[Message],
        *,
        about: Sequence[str] | None = None,
        expansions: Sequence[str | None] | None = None,
        plain_text: bool = False,
    ) -> Prompt:
        """Prompt for any conversation that ends with a user's message, whose texts are the question.

        `expansions` says of each image what stands for it; None is one image token for each. `about` names keywords in
        place of the question's nouns. A special token that a text types is the control token it names, as in Hugging
        Face; with `plain_text` it is encoded as text. `ResPruneError` for a question that is empty, for what is no
        Unicode text, is longer than the context or types the image token without `plain_text`, and for a conversation
        that the chat template does not take.
        """
        spoken = _texts(messages)
        for part in spoken:
            _require_text(part)
        # A message has at least the token that says whose it is.
        self._require_room(len(messages) + sum(map(len, spoken)) // LONGEST_TOKEN, "the question")
        if about is not None:
            about = words(about, "about")
            self._require_room(sum(map(len, about)) // LONGEST_TOKEN, "about")
        images = sum(part["type"] == "image" for message in messages for part in message["content"])
        texts = [part["text"] for part in messages[-1]["content"] if part["type"] == "text"]
        question = _BETWEEN_TEXTS.join(texts)
        if not any(text.strip() for text in texts):
            raise ResPruneError("the question is empty; ask something about the image")
        expansions = [None] * images if expansions is None else expansions
        plain = self._plain_text() if plain_text else None
        if plain is not None and not plain.types_special(spoken):
            plain = None

        def write(messages: Sequence[Message]) -> str:
            """The prompt's text, as it is encoded."""
            if plain is None:
                return self._expand(expansions, self._render(messages))
            rendered = self._render(_with_texts(messages, plain.hidden))
            return plain.written(self._expand(expansions, rendered))

        written = write(messages)
        text = written if plain is None else plain.shown(written)
        # A template that writes BOS itself must not get a second one (transformers' apply_chat_template).
        bos = self.variables.get("bos_token")
        adds = not (bos and text.startswith(bos))
        with tokenizer_panics("the question cannot be encoded"):
            if plain is None:
                encoding = self.tokenizer.encode(text, add_special_tokens=adds)
                ids, offsets = encoding.ids, encoding.offsets
            else:
                ids, offsets = plain.encode(written, add_special_tokens=adds)
        self._require_room(len(ids), "the question")
        image_token = self.variables["image_token"]
        expected = sum(1 if one is None else one.count(image_token) for one in expansions)
        if ids.count(self.image_token_id) != expected:
            raise ResPruneError(
                f"the tokenizer makes something else of {self.variables['image_token']} than the image token "
                f"{self.image_token_id}; export the bundle again from a whole checkpoint"
            )
        inside, outside = (about, []) if about is None else split_keywords(question, about)
        terms = question_terms(question, inside)
        spans: list[tuple[int, int]] = []
        start = 0
        for number, part in enumerate(texts):
            of_part = [
                (first - start, last - start)
                for first, last in terms
                if start <= first and last <= start + len(part)
            ]
            region = (0, len(written))
            # Marks tell it from the same words of history and template, for which the template has to run again.
            if of_part and not (self._keeps_questions and _stands_once(part.strip(), written)):
                region = _between_marks(written, write(_marked(messages, number)))
            spans += _locate(of_part, part, written, region)
            start += len(part) + len(_BETWEEN_TEXTS)
        return Prompt(
            messages=list(messages),
            text=text,
            ids=ids,
            text_positions=[
                index
                for index, (start, end) in enumerate(offsets)
                if any(start < last and first < end for first, last in spans)
            ],
            plain_text=plain is not None,
            nouns=[question[first:last] for first, last in terms] + outside,
            further_ids=[token for word in outside for token in self._keyword_ids(word)],
            adds_special_tokens=adds,
        )

    @cached_property
    def _keeps_questions(self) -> bool:
        """Whether the template writes a question as it stands, but for the white space around it."""
        try:
            return _PROBE in self._render([user_message(_PROBE, 1)])
        except ResPruneError:
            return False

    def _keyword_ids(self, word: str) -> list[int]:
        """The tokens of a word as it stands inside a text, where many tokenizers write it with the space before it."""
        twice = self.tokenizer.encode(f"{word} {word}", add_special_tokens=False)
        ids = [token for token, (_, end) in zip(twice.ids, twice.offsets, strict=True) if end > len(word) + 1]
        return [token for token in ids if token != self.image_token_id]

    def _plain_text(self) -> PlainText:
        return PlainText(self.tokenizer, [self.variables["image_token"], self.placeholder])

    def _require_room(self, length: int, what: str) -> None:
        """`ResPruneError` unless `length` tokens, and one more, fit into the context: before anything is embedded."""
        if length >= self._context_length:
            raise ResPruneError(
                f"{what} is past the context: {length} tokens or more, limit {self._context_length}; "
                "ask a shorter one, or leave out earlier turns"
            )

    def _render(self, messages: Sequence[Message]) -> str:
        return render(
            messages, self.template, self.variables, placeholder=self.placeholder, plain=self._plain
        )

    def _expand(self, expansions: Sequence[str | None], text: str) -> str:
        """A rendered prompt with each image's expansion in the place of its placeholder.

        `ResPruneError` unless it has one placeholder for each image.
        """
        token = self.variables["image_token"]
        between = text.split(self.placeholder)
        typed = next((token for part in between if token in part), self.placeholder)
        if typed != self.placeholder or len(between) != len(expansions) + 1:
            raise ResPruneError(
                f"the question contains {typed}, which stands for an image; "
                "leave it out and give the image itself"
            )
        whole = between[0]
        for expansion, after in zip(expansions, between[1:], strict=True):
            whole += (token if expansion is None else expansion) + after
        return whole


def _require_text(part: object) -> None:
    """`ResPruneError` for what is no text."""
    if _NONCHARACTERS.search(require_text(part, "the question")):
        raise ResPruneError(
            "the question has characters that Unicode reserves (U+FDD0 to U+FDEF); leave them out"
        )


def _stands_once(part: str, text: str) -> bool:
    return text.find(part) == text.rfind(part) >= 0


def _between_marks(text: str, marked: str) -> tuple[int, int]:
    """Where the question stands in a prompt's text: `marked` is the same prompt with marks around it."""
    before, _, rest = marked.partition(_QUESTION_START)
    after = rest.rpartition(_QUESTION_END)[2]
    return len(before), len(text) - len(after)


def _locate(
    terms: Sequence[tuple[int, int]], question: str, text: str, region: tuple[int, int]
) -> list[tuple[int, int]]:
    """Spans of the question's terms in the region of the prompt's text where the question stands.

    If the template trims the question the spans shift; if it rewrites it, each term is looked for by itself.
    """
    start, end = region
    shift = text.find(question.strip(), start, end)
    if shift >= 0:
        shift -= len(question) - len(question.lstrip())
        return [(first + shift, last + shift) for first, last in terms]
    spans, cursor = [], start
    for first, last in terms:
        found = text.find(question[first:last], cursor, end)
        if found >= 0:
            cursor = found + last - first
            spans.append((found, cursor))
    return spans


def _marked(messages: Sequence[Message], number: int) -> list[Message]:
    """The conversation with marks around one text of its last message."""
    content = [dict(part) for part in messages[-1]["content"]]
    part = [part for part in content if part["type"] == "text"][number]
    part["text"] = f"{_QUESTION_START}{part['text']}{_QUESTION_END}"
    return [*messages[:-1], {**messages[-1], "content": content}]


def _texts(messages: Sequence[Message]) -> list[Any]:
    """Everything that a conversation says."""
    return [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]


def _with_texts(messages: Sequence[Message], change: Callable[[str], str]) -> list[Message]:
    """The conversation with each of its texts changed."""

    def changed(part: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**part, "text": change(part["text"])} if part["type"] == "text" else part

    return [{**message, "content": list(map(changed, message["content"]))} for message in messages]


def load_tokenizer(bundle: Bundle) -> "tokenizers.Tokenizer":
    """The bundle's tokenizer, which neither cuts nor fills up; `ResPruneError` for a file that is none."""
    import tokenizers

    path = bundle.file_path("tokenizer.json")
    try:
        with tokenizer_panics(f"{path} is not a tokenizer"):
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except ResPruneError:
        raise
    except Exception as error:  # what tokenizers raises is a bare Exception
        raise ResPruneError(
            f"{path} is not a tokenizer ({one_line(error)}); export the bundle again"
        ) from None
    # A tokenizer.json may carry the settings it was last trained with; a prompt is never cut or filled up.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _special_tokens(bundle: Bundle) -> dict[str, str]:
    """Special tokens by name (`bos_token`: "<s>"), as templates read them.

    `special_tokens_map.json` has those that transformers made of all the checkpoint's files; bundles of before have
    `tokenizer_config.json` alone.
    """
    tokens = {}
    names = ("special_tokens_map.json", "tokenizer_config.json")
    name = next((name for name in names if name in bundle.manifest.files), None)
    config: dict[str, Any] = bundle.json(name) if name else {}
    for key, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(content, str):
            tokens[key] = content
    return tokens
