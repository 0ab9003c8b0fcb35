"""The objects of an answer: a chat completion, or its chunks as server-sent events."""

import json
from time import time
from typing import Any
from uuid import uuid4

from resprune.serving.model import Began, Ended

DONE = b"data: [DONE]\n\n"


class Reply:
    """What every object of one answer has in common, and how each is made of the answer's events."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._id = f"chatcmpl-{uuid4().hex}"
        self._created = int(time())

    def whole(self, began: Began, text: str, ended: Ended, queue_ms: float) -> dict[str, Any]:
        """`chat.completion`."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": ended.reason}
        return {
            **self._head("chat.completion"),
            "choices": [choice],
            "usage": usage(began, ended),
            "resprune": {"images": began.images, "timings": timings(ended, queue_ms)},
        }

    def opening(self, began: Began) -> dict[str, Any]:
        """The first chunk: the role, and which visual tokens were kept."""
        return self._chunk({"role": "assistant", "content": ""}) | {"resprune": {"images": began.images}}

    def piece(self, text: str) -> dict[str, Any]:
        """A chunk with text."""
        return self._chunk({"content": text})

    def closing(self, ended: Ended, queue_ms: float) -> dict[str, Any]:
        """The last chunk of the answer."""
        return self._chunk({}, ended.reason) | {"resprune": {"timings": timings(ended, queue_ms)}}

    def usage(self, began: Began, ended: Ended) -> dict[str, Any]:
        """The chunk that `include_usage` asks for, after the last."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage(began, ended)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}


def usage(began: Began, ended: Ended) -> dict[str, Any]:
    """Tokens that the language model read and wrote; of an image only those that were kept."""
    total = began.prompt_tokens + ended.completion_tokens
    return {
        "prompt_tokens": began.prompt_tokens,
        "completion_tokens": ended.completion_tokens,
        "total_tokens": total,
    }


def timings(ended: Ended, queue_ms: float) -> dict[str, float]:
    """Milliseconds of each stage, to a microsecond."""
    return {name: round(ms, 3) for name, ms in {"queue": queue_ms, **ended.timings}.items()}


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
