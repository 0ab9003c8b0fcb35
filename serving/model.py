"""One bundle as the server sees it: images and a conversation in, the events of an answer out."""

import hashlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from resprune.runtime.families.image import load_image
from resprune.runtime.pipeline import Pipeline, View
from resprune.runtime.prompt.messages import Message
from resprune.serving.cache import ByteCache
from resprune.serving.chat import ChatRequest, ImagePart, Part
from resprune.serving.stop import StopFilter
from resprune.serving.workers import Running


@dataclass(frozen=True)
class Seen:
    """An encoded image, and its (width, height) in pixels."""

    view: View
    size: tuple[int, int]


@dataclass(frozen=True)
class Began:
    """The prompt is prefilled: how many tokens the model saw, and of each image what it kept."""

    prompt_tokens: int
    images: list[dict[str, Any]]


@dataclass(frozen=True)
class Ended:
    """The answer is whole: why it ended, how many tokens it has, milliseconds of each stage."""

    reason: str
    completion_tokens: int
    timings: dict[str, float] = field(default_factory=dict)


Event = Began | str | Ended
"""A string is text that was added, "" where a token added none."""


class Model:
    """A pipeline with a name, whose encoded images are kept in `cache` by their content."""

    def __init__(
        self,
        name: str,
        pipeline: Pipeline,
        cache: ByteCache[Seen],
        *,
        created: int,
        max_pixels: int,
        plain_text: bool,
    ) -> None:
        self.name = name
        self.pipeline = pipeline
        self.created = created
        self._cache = cache
        self._max_pixels = max_pixels
        self._plain_text = plain_text

    def answer(
        self, request: ChatRequest, contents: Sequence[bytes], running: Running[Event]
    ) -> Generator[Event]:
        """Answer a request about the images whose files are `contents`, in the order of its conversation.

        There may be none: the language model alone answers. `running` is asked between two stages whether anybody
        still waits. Raises `ResPruneError` for what the client can put right.
        """
        start = perf_counter()
        seen = []
        for content in contents:
            running.check()
            seen.append(self._see(content))
        encoded = perf_counter()
        running.check()
        view = View.joined([image.view for image in seen]) if seen else self.pipeline.without_images()
        answer = view.answer(
            [_message(message.role, message.content) for message in request.messages],
            about=request.resprune.about,
            tokens=request.resprune.tokens,
            plain_text=self._plain_text,
            max_new_tokens=request.limit or self.pipeline.manifest.context_length,
            **request.sampling,
        )
        try:
            images = [
                self._image(
                    image, picks.pick_order.tolist(), picks.kept_indices.tolist(), request.resprune.boxes
                )
                for image, picks in zip(seen, answer.images, strict=True)
            ]
            yield Began(answer.prompt_tokens, images)
            stop = StopFilter(request.stop)
            first: float | None = None
            for piece in answer.steps():
                first = first or perf_counter()
                yield stop.push(piece)
                if stop.found:
                    break
            yield stop.finish()
            reason = "stop" if stop.found else answer.finish_reason
            end = perf_counter()
            timings = {
                "encode": (encoded - start) * 1e3,
                **answer.timings_so_far,
                "first_token": ((first or end) - start) * 1e3,
                "total": (end - start) * 1e3,
            }
            yield Ended(reason, answer.tokens_written, timings)
        finally:
            answer.close()

    def describe(self) -> dict[str, Any]:
        """The model object of OpenAI's API, with what the bundle says of itself."""
        manifest = self.pipeline.manifest
        selection = manifest.selection
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "resprune",
            "resprune": {
                "model": manifest.model,
                "family": manifest.family,
                "k": selection.k,
                "num_tokens": selection.num_tokens,
                "context_length": manifest.context_length,
                "positions": manifest.positions,
                "attention": manifest.attention,
            },
        }

    def _see(self, content: bytes) -> Seen:
        key = (self.name, hashlib.sha256(content).digest())
        return self._cache.get(key, lambda: self._look(content))

    def _look(self, content: bytes) -> Seen:
        image = load_image(content, max_pixels=self._max_pixels)
        return Seen(self.pipeline.look(image), image.size)

    def _image(self, image: Seen, order: list[int], kept: list[int], boxes: bool) -> dict[str, Any]:
        """What an answer says of one image; boxes are of the kept tokens, in pick order, in pixels."""
        (num_tokens,) = image.view.num_tokens
        said: dict[str, Any] = {
            "size": list(image.size),
            "num_tokens": num_tokens,
            "kept_indices": kept,
            "pick_order": order,
        }
        if boxes:
            places = self.pipeline.boxes(image.size)
            said["boxes"] = [places[index] for index in order]
        return said


def _message(role: str, content: Sequence[Part]) -> Message:
    """A message as chat templates take it, in which an image is only a place."""
    return {
        "role": "system" if role == "developer" else role,
        "content": [
            {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text}
            for part in content
        ],
    }
