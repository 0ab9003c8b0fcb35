"""Conversations as chat templates take them: what callers pass is checked, and a question becomes one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resprune.runtime.arguments import choice, instance, items, mapping, text
from resprune.runtime.errors import ResPruneError

# {"role": "user" | "assistant" | "system", "content": [{"type": "image"}, {"type": "text", "text": …}]}
Message = Mapping[str, Any]
ROLES = ("system", "user", "assistant")
KINDS = ("text", "image")


@dataclass(frozen=True)
class Turn:
    """A question that has been answered."""

    question: str
    answer: str


def user_message(question: str, images: int) -> Message:
    """A user's turn: the images in order, then the question."""
    return {
        "role": "user",
        "content": [{"type": "image"}] * images + [{"type": "text", "text": question}],
    }


def assistant_message(text: str) -> Message:
    """An answer already given."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def as_messages(question: str, images: int, history: Sequence[Turn] = ()) -> list[Message]:
    """A question about a number of images, which stand at the head of the first turn, after what was said before."""
    messages: list[Message] = []
    for entry in items(history, "history", "a list of turns"):
        turn = instance(entry, "each entry of history", Turn, "a Turn")
        messages.append(user_message(turn.question, 0 if messages else images))
        messages.append(assistant_message(turn.answer))
    messages.append(user_message(question, 0 if messages else images))
    return messages


def checked_messages(messages: Sequence[Message], images: int) -> list[Message]:
    """The messages of a caller, each text content as a list of one part.

    `ResPruneError`, naming the message, for what is no conversation about so many `images` that a user's message ends.
    """
    listed = [
        _checked(entry, f"messages[{number}]")
        for number, entry in enumerate(items(messages, "messages", "a list of messages"))
    ]
    if not listed or listed[-1]["role"] != "user":
        raise ResPruneError("the last message should be the user's, for it is answered")
    shown = sum(part["type"] == "image" for message in listed for part in message["content"])
    if shown != images:
        raise ResPruneError(
            f"the messages show {shown} images, and there are {images}; give one part of the type image for each, "
            "in order"
        )
    return listed


def _checked(entry: object, name: str) -> Message:
    message = mapping(entry, name)
    role = choice(message.get("role"), f"the role of {name}", ROLES)
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    parts = []
    for part in items(content, f"the content of {name}", "a text or a list of parts"):
        kind = choice(
            mapping(part, f"each part of {name}").get("type"), f"the type of each part of {name}", KINDS
        )
        parts.append(
            {"type": kind}
            if kind == "image"
            else {"type": kind, "text": text(part.get("text"), f"each text of {name}")}
        )
    return {"role": role, "content": parts}
