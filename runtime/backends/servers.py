"""A language model on a server: the selection here, the kept rows over HTTP, the answer back as it is written.

What differs from server to server is one row of `APIS`. None of them has been run with this: the formats were read in
vLLM 0.33 (docs/features/multimodal_inputs.md), TensorRT-LLM 1.3 (tensorrt_llm/serve/chat_utils.py) and SGLang 0.5.23
(srt/multimodal/processors), and the server that the tests answer from speaks them.
"""

import base64
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from resprune.runtime.arguments import choice as require_choice
from resprune.runtime.arguments import text as require_text
from resprune.runtime.backends.backend import (
    Backend,
    BackendFactory,
    Embedding,
    Piece,
    Reading,
    Request,
    expanded_ids,
    require_plain_attention,
    together,
)
from resprune.runtime.backends.formats import SGLANG, TRTLLM, VLLM
from resprune.runtime.backends.http_client import Exchange, Server
from resprune.runtime.backends.session import SessionOptions
from resprune.runtime.backends.torch_save import torch_save
from resprune.runtime.bundle.files import Bundle
from resprune.runtime.defaults import DEADLINE_SECONDS, TIMEOUT_SECONDS
from resprune.runtime.errors import ResPruneError, one_line, shown
from resprune.runtime.families.table import family_of
from resprune.runtime.prompt.prompter import Prompt
from resprune.runtime.prompt.splice import Floats, Ints, KeptTokens
from resprune.runtime.sampling import LARGEST_ID, Sampling, named_settings

KEY_VARIABLE = "RESPRUNE_SERVER_KEY"
LONGEST_TOKEN = 1024
"""Characters; far above what any vocabulary has."""
SGLANG_WITH_POSITIONS = (0, 5, 23)


@dataclass(frozen=True)
class Question:
    """One prompt on its way to a server.

    `expanded_ids` has an image token for each row that is kept; `position_ids` [S] or [3, S] are its numbers, and
    `ahead` is how far the one after them is ahead of S.
    """

    prompt: Prompt
    images: Sequence[KeptTokens]
    expanded_ids: list[int]
    position_ids: Ints
    sampling: Sampling
    model: str | None
    ahead: int = 0


@dataclass(frozen=True)
class Api:
    """One row: where and how a kind of server takes kept rows.

    A family's row has the servers that get its positions right. `wrong` says why this one is not among them;
    `positions` are the policies that it can follow.
    """

    title: str
    path: str
    positions: tuple[str, ...]
    wrong: str
    body: Callable[[Question], dict[str, Any]]
    read: Callable[[Question, Iterator[dict[str, Any]]], Iterator[Piece]]
    meet: Callable[[Server, str | None], str | None]
    """First contact, before anything is sent: checks the server and returns the name of its model."""


def server(
    url: str,
    *,
    api: str = VLLM,
    model: str | None = None,
    timeout: float = TIMEOUT_SECONDS,
    deadline: float = DEADLINE_SECONDS,
) -> BackendFactory:
    """What `Pipeline.load(bundle, generator=…)` takes to let the server at `url` answer.

    `api` is a name in `APIS`; `model` what the server calls its model, None for the only one it has; `timeout` the
    longest silence and `deadline` the longest whole answer, in seconds. A key in the environment variable
    RESPRUNE_SERVER_KEY is sent along.
    """
    require_choice(api, "api", APIS)
    if model is not None:
        require_text(model, "model")
    target = Server(url, timeout, _key(), deadline)

    def factory(bundle: Bundle, embedding: Embedding, options: SessionOptions) -> Backend:
        require_plain_attention(bundle, APIS[api].title)
        check_positions(bundle, api)
        return ServerBackend(target, APIS[api], model, bundle.manifest.image_token_id)

    return factory


def _key() -> str | None:
    """The key, as a header can carry it; None where there is none."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ResPruneError(
            f"{KEY_VARIABLE} should be printable ASCII; set it to the server's key, or unset it"
        )
    return key or None


def check_positions(bundle: Bundle, name: str) -> None:
    """`ResPruneError` if a server of this format would give the bundle's kept tokens, or its text, wrong positions."""
    api, family, positions = APIS[name], family_of(bundle), bundle.manifest.positions
    if name not in family.servers:
        raise ResPruneError(f"{api.title} {api.wrong.format(family=family.title)}")
    if positions not in api.positions:
        raise ResPruneError(
            f"{api.title} numbers every prompt 0, 1, 2 …, and this bundle was exported with --positions {positions}; "
            f"export it again with --positions contiguous"
        )


class ServerBackend:
    """Sends each prompt of a request as a request of its own; the server puts them in one batch as it sees fit."""

    def __init__(self, target: Server, api: Api, model: str | None, image_token_id: int) -> None:
        self._server = target
        self._api = api
        self._image_token_id = image_token_id
        self._model = api.meet(target, model)

    def start(self, request: Request, sampling: Sampling) -> Iterator[list[Piece]]:
        """Send the prompts and wait until all are accepted (see `Backend`)."""
        questions = [self._question(request, row, sampling) for row in range(len(request.prompts))]
        exchanges: list[Exchange] = []
        try:
            # All are under way before the first is waited for.
            exchanges.extend(
                self._server.post(self._api.path, self._api.body(question)) for question in questions
            )
            for exchange in exchanges:
                exchange.begin()
        except BaseException:
            for exchange in exchanges:
                exchange.close()
            raise
        return together([self._read(*pair) for pair in zip(questions, exchanges, strict=True)])

    def close(self) -> None:
        """Nothing is held between requests."""

    def _question(self, request: Request, row: int, sampling: Sampling) -> Question:
        present = request.spliced.attention_mask[row] > 0
        return Question(
            request.prompts[row],
            request.images[row],
            expanded_ids(request, row, self._image_token_id),
            request.spliced.position_ids[..., row, present],
            sampling,
            self._model,
            request.spliced.ahead(row),
        )

    def _read(self, question: Question, exchange: Exchange) -> Reading[Piece]:
        pieces = _held(self._api.read(question, exchange.events()), question.sampling.max_new_tokens)
        return Reading(_understood(pieces, self._server, self._api), exchange.close)


def _understood(pieces: Iterator[Piece], target: Server, api: Api) -> Iterator[Piece]:
    """The pieces; an event that lacks what its API promises is one sentence."""
    try:
        yield from pieces
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise ResPruneError(
            f"{target.url} sent an event that is not one of {api.title}'s ({type(error).__name__}: {one_line(error)}); "
            "check --server-format and the server's version"
        ) from None


def _held(pieces: Iterator[Piece], most: int) -> Iterator[Piece]:
    """At most `most` tokens, whatever a server sends: where it tells text alone, each piece is a token at least.

    A piece of text is cut at what that many tokens can be, LONGEST_TOKEN characters each.
    """
    for piece in pieces:
        if isinstance(piece, str):
            yield piece[: most * LONGEST_TOKEN]
            most -= 1
        elif piece is not None:
            yield piece[:most]
            most -= len(piece)
        if piece is None or most <= 0:
            yield None
            return


def _token_id(value: object) -> int:
    """A token id that a server sent; `ValueError` for what is none."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST_ID:
        raise ValueError(f"{shown(value)} is no token id")
    return value


def _named_model(target: Server, model: str | None) -> str:
    """What the user calls the model, else the only one there is."""
    if model is not None:
        return model
    listed = target.get("/v1/models")
    try:
        names: list[str] = [model["id"] for model in listed["data"]]
        if not all(isinstance(name, str) for name in names):
            raise TypeError
    except (KeyError, TypeError):
        raise ResPruneError(
            f"{target.url} does not say which models it has; name one with --server-model"
        ) from None
    if len(names) != 1:
        raise ResPruneError(
            f"{target.url} has {len(names)} models ({one_line(', '.join(names))}); choose one with --server-model"
        )
    return names[0]


def _takes_positions(target: Server, model: str | None) -> str | None:
    """An SGLang that does not read `mrope_positions` would number the tokens itself, and say nothing."""
    info = target.get("/server_info") or target.get("/get_server_info")
    version = str(info.get("version", "")) if isinstance(info, dict) else ""
    numbers = tuple(int(number) for number in re.findall(r"\d{1,9}", version)[:3])
    if numbers < SGLANG_WITH_POSITIONS:
        needed = ".".join(map(str, SGLANG_WITH_POSITIONS))
        raise ResPruneError(
            f"{target.url} runs SGLang {one_line(version) or 'of an unknown version'}, which may not take positions; "
            f"{needed} or newer does"
        )
    return model


def _image_rows(rows: Floats) -> str:
    """Rows [n, D] as base64 of `torch.save`: float16 where that loses nothing, as with the rows of an fp16 tower."""
    with np.errstate(over="ignore"):  # what half precision cannot hold is sent in float32
        half = rows.astype(np.float16)
    lossless = bool(np.array_equal(half, rows))
    return base64.b64encode(torch_save(half if lossless else rows)).decode()


def _chat_body(question: Question, image_embeds: Callable[[str], Any]) -> dict[str, Any]:
    """Chat completions: the conversation, its images in place of the template's."""
    if question.prompt.plain_text:
        raise ResPruneError(
            "this server makes the prompt of text, in which typed special tokens are control tokens; "
            "leave them out, ask without --plain-text, or use --server-format sglang"
        )
    rows = iter(_image_rows(image.rows) for image in question.images)
    messages = [
        {
            **message,
            "content": [
                {"type": "image_embeds", "image_embeds": image_embeds(next(rows))}
                if part["type"] == "image"
                else part
                for part in message["content"]
            ],
        }
        for message in question.prompt.messages
    ]
    return {
        "model": question.model,
        "messages": messages,
        "stream": True,
        # Unasked, a server tokenizes what its template makes without BOS, whether the template writes one or not.
        "add_special_tokens": question.prompt.adds_special_tokens,
    }


def _vllm_body(question: Question) -> dict[str, Any]:
    names = _OPENAI | {"min_p": "min_p"}
    return (
        _chat_body(question, lambda rows: rows)
        | _settings(question.sampling, names, "vLLM", all_ids=-1)
        | {"return_token_ids": True}
    )


def _trtllm_body(question: Question) -> dict[str, Any]:
    return _chat_body(question, lambda rows: {"data": rows}) | _settings(
        question.sampling, _OPENAI, "trtllm-serve", all_ids=0
    )


# Our names of settings, and those of the OpenAI API and what both vLLM and TensorRT-LLM added to it.
_OPENAI = {
    "max_new_tokens": "max_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "repetition_penalty": "repetition_penalty",
    "min_new_tokens": "min_tokens",
    "seed": "seed",
}
_SGLANG = {
    "max_new_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "min_new_tokens": "min_new_tokens",
    "seed": "sampling_seed",
}


def _settings(sampling: Sampling, names: Mapping[str, str], title: str, *, all_ids: int) -> dict[str, Any]:
    """Every setting by a server's name, also what is neutral: a server fills in what is left unsaid by itself.

    `all_ids` is the server's `top_k` that leaves none out.
    """
    settings = named_settings(sampling, names, title)
    settings["top_k"] = settings["top_k"] or all_ids
    if settings[names["seed"]] is None:
        del settings[names["seed"]]
    return settings


def _read_chat(question: Question, events: Iterator[dict[str, Any]]) -> Iterator[Piece]:
    """Token ids where the server tells them, else text; vLLM also tells what prompt it made of the messages."""
    for event in events:
        written = event.get("prompt_token_ids")
        if written is not None and written not in (question.expanded_ids, question.prompt.ids):
            raise ResPruneError(
                "the server makes another prompt of the question than this bundle; serve the checkpoint that the "
                "bundle was exported from, with its own chat template"
            )
        for choice in event["choices"][:1]:  # one answer is asked for
            ids, text = choice.get("token_ids"), choice["delta"].get("content")
            if ids is not None:
                yield [_token_id(token) for token in ids]
            elif text:
                yield str(text)
            if choice.get("finish_reason") == "length":
                yield None


def _sglang_body(question: Question) -> dict[str, Any]:
    """SGLang's own /generate: token ids, and one dict with the rows of all images and the positions of all tokens."""
    body: dict[str, Any] = {
        "input_ids": question.expanded_ids,
        "sampling_params": _settings(question.sampling, _SGLANG, "SGLang", all_ids=-1),
        "stream": True,
    }
    if question.images:
        data = {
            "format": "precomputed_embedding",
            "feature": np.concatenate([kept.rows for kept in question.images]).tolist(),
            "mrope_positions": question.position_ids.tolist(),
            "mrope_position_delta": question.ahead,
        }
        body["image_data"] = [data]
    return body


def _read_sglang(question: Question, events: Iterator[dict[str, Any]]) -> Iterator[Piece]:
    """An event has all ids so far, or with incremental output the new ones; it counts all either way."""
    seen = 0
    for event in events:
        finish = event["meta_info"].get("finish_reason")
        if isinstance(finish, dict) and finish.get("type") == "abort":
            raise ResPruneError(
                f"the server gave up the answer: {one_line(finish.get('message', 'no reason given'))}"
            )
        total, ids = event["meta_info"]["completion_tokens"], event["output_ids"]
        if type(total) is not int or not 0 <= total - seen <= len(ids):
            raise ValueError(f"completion_tokens {shown(total)} after {seen}")
        yield [_token_id(token) for token in ids[len(ids) - (total - seen) :]]
        seen = total
        if isinstance(finish, dict) and finish.get("type") == "length":
            yield None


_BY_GRID = (
    "numbers the visual tokens of {family} by the image's grid, so those that were kept would get wrong positions; "
    "serve it with SGLang (--server-format sglang), or leave out --server"
)
_BY_SIZE = (
    "lays out the visual tokens of {family} by the image's size, so fewer of them cannot be passed; serve it with "
    "vLLM (--server-format vllm) or TensorRT-LLM (--server-format trtllm)"
)
APIS = {
    VLLM: Api(
        "vLLM",
        "/v1/chat/completions",
        ("contiguous",),
        _BY_GRID,
        _vllm_body,
        _read_chat,
        _named_model,
    ),
    TRTLLM: Api(
        "TensorRT-LLM",
        "/v1/chat/completions",
        ("contiguous",),
        _BY_GRID,
        _trtllm_body,
        _read_chat,
        _named_model,
    ),
    SGLANG: Api(
        "SGLang",
        "/generate",
        ("original",),
        _BY_SIZE,
        _sglang_body,
        _read_sglang,
        _takes_positions,
    ),
}
