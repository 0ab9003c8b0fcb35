"""OpenAI's chat completions: what a request may say, and the objects of an answer.

https://platform.openai.com/docs/api-reference/chat. The object `resprune` in both is this project's extension.
"""

from typing import Annotated, Any, Literal

import pydantic_core
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from resprune.runtime.budget import Budget
from resprune.runtime.errors import ResPruneError
from resprune.serving.errors import ApiError, invalid

# Parameters that change the answer and that this server lacks, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "parallel_tool_calls": (True, False),  # there are no tools
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
# Labels for the operator of a server; they change no answer.
IGNORED = ("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")


class Strict(BaseModel):
    """No conversions, no unknown fields, no NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class TextPart(Strict):
    """A text of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    """Where an image is: a data URL, or an address at a host that the server may ask."""

    url: str = Field(min_length=1)
    detail: Literal["auto"] = "auto"


class ImagePart(Strict):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


def _parts(content: object) -> object:
    """A string is one text part."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Text = Annotated[list[TextPart], BeforeValidator(_parts), Field(min_length=1)]


class UserMessage(Strict):
    """What the user says and shows."""

    role: Literal["user"]
    content: Annotated[list[Part], BeforeValidator(_parts), Field(min_length=1)]


class SystemMessage(Strict):
    """Instructions that stand before the conversation."""

    role: Literal["system", "developer"]
    content: Text


class AssistantMessage(Strict):
    """An earlier answer."""

    role: Literal["assistant"]
    content: Text


Message = Annotated[UserMessage | SystemMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(Strict):
    """`include_usage`: a last chunk without choices has the usage."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


def _budget(tokens: Any) -> Any:
    """A number, or a string as it stands, if `Budget` takes it."""
    text = str(tokens) if type(tokens) is int else tokens
    try:
        Budget.parse(text)
    except ResPruneError as error:
        raise pydantic_core.PydanticCustomError("budget", "{reason}", {"reason": str(error)}) from None
    return text


class Extension(Strict):
    """`tokens`: visual tokens to keep of each image (8, "11%", "all"); `about`: keywords that guide the selection.

    `boxes`: tell where in the image each kept token lies.
    """

    tokens: Annotated[str, BeforeValidator(_budget)] | None = None
    about: list[str] | None = None
    boxes: bool = False


def _stops(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


class ChatRequest(Strict):
    """The body of POST /v1/chat/completions."""

    model: str
    messages: list[Message] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]], BeforeValidator(_stops), Field(max_length=4)
    ] = []
    resprune: Extension = Extension()

    @property
    def limit(self) -> int | None:
        """The most tokens the answer may have; None for what the context leaves."""
        given = [limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None]
        return min(given, default=None)

    @property
    def sampling(self) -> dict[str, Any]:
        """What it says of how tokens are chosen, as `Sampling` names it; the bundle's checkpoint says the rest."""
        seed = None if self.seed is None else self.seed % 2**64
        given = {"temperature": self.temperature, "top_p": self.top_p, "seed": seed}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def image_urls(self) -> list[str]:
        """The addresses of all images, in the order of the conversation."""
        return [
            part.image_url.url
            for message in self.messages
            for part in message.content
            if isinstance(part, ImagePart)
        ]


def read_request(body: bytes) -> ChatRequest:
    """The request in `body`; `ApiError` with status 400 that names what is wrong."""
    try:
        fields = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:  # also what nests too deep, and what is no UTF-8
        raise ApiError(400, f"the body is not valid JSON ({error})", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body should be a JSON object", code="invalid_type")
    fields = _without_nulls(fields)
    for name, neutral in UNSUPPORTED.items():
        if name in fields:
            value = fields.pop(name)
            if not any(type(value) in _like(same) and value == same for same in neutral):
                raise ApiError(
                    400,
                    f"{name} is not supported by this server; leave it out",
                    param=name,
                    code="unsupported_parameter",
                )
    for name in IGNORED:
        fields.pop(name, None)
    try:
        request = ChatRequest.model_validate(fields)
    except ValidationError as error:
        raise invalid(error) from None
    if request.messages[-1].role != "user":
        raise _wrong("messages", "the last message should be the user's, for it is answered")
    if request.stream_options is not None and not request.stream:
        raise _wrong("stream_options", "stream_options goes with stream: true")
    return request


def _wrong(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")


def _without_nulls(value: Any) -> Any:
    """A field that is null is one that was left out."""
    if isinstance(value, dict):
        return {key: _without_nulls(field) for key, field in value.items() if field is not None}
    if isinstance(value, list):
        return [_without_nulls(field) for field in value]
    return value


def _like(value: object) -> tuple[type, ...]:
    """0 and 0.0 are one number, and False is none."""
    return (int, float) if type(value) is int else (type(value),)
