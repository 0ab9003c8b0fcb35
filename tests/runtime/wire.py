"""A server that speaks the formats of vLLM, TensorRT-LLM and SGLang in front of a checkpoint in PyTorch.

Nothing of the runtime is in it: prompts are written by transformers' chat template and tokenizer, tensors are read by
`torch.load`, tokens come from the Hugging Face model one by one. `Fault` makes it misbehave.
"""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer


class Model:
    """A checkpoint in float32 that generates from ids, rows and positions."""

    def __init__(self, root: Path) -> None:
        self.whole: Any = AutoModelForImageTextToText.from_pretrained(root, dtype=torch.float32).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(root)
        self.template = (root / "chat_template.jinja").read_text()
        self.image_token_id: int = self.whole.config.image_token_id
        eos = self.whole.generation_config.eos_token_id or self.whole.config.text_config.eos_token_id
        self.eos: list[int] = eos if isinstance(eos, list) else [eos]
        self.lock = threading.Lock()

    def reason(self, ids: list[int]) -> str:
        """Why an answer of these ids ended."""
        return "stop" if ids[-1] in self.eos else "length"

    def prompt(
        self, messages: list[dict[str, Any]], rows: list[Tensor], add_special_tokens: bool
    ) -> list[int]:
        """Ids with an image token a row; as in vLLM, what the template makes is all there is unless more is asked."""
        text: str = self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, tokenize=False, add_generation_prompt=True
        )
        ids = self.tokenizer(text, add_special_tokens=add_special_tokens).input_ids
        counts = iter(len(picture) for picture in rows)
        return [token for id_ in ids for token in [id_] * (next(counts) if id_ == self.image_token_id else 1)]

    @torch.no_grad()
    def generate(
        self, ids: list[int], rows: Tensor, positions: Tensor, sampling: dict[str, Any]
    ) -> Iterator[int]:
        """One token at a time; `positions` [1, S] or [3, 1, S]."""
        generator = torch.Generator().manual_seed(sampling.get("seed") or 0)
        tokens = torch.tensor([ids])
        embeds = self.whole.get_input_embeddings()(tokens * (tokens != self.image_token_id))
        embeds[tokens == self.image_token_id] = rows.to(embeds.dtype)
        past = None
        for _ in range(sampling["max_tokens"]):
            with self.lock:
                out = self.whole.model.language_model(
                    inputs_embeds=embeds, position_ids=positions, past_key_values=past, use_cache=True
                )
                logits = self.whole.lm_head(out.last_hidden_state[0, -1])
            past = out.past_key_values
            if sampling["temperature"] == 0:
                token = int(logits.argmax())
            else:
                weights = torch.softmax(logits / sampling["temperature"], dim=-1)
                token = int(torch.multinomial(weights, 1, generator=generator))
            yield token
            if token in self.eos:
                return
            embeds = self.whole.get_input_embeddings()(torch.tensor([[token]]))
            positions = positions[..., -1:] + 1


@dataclass
class Fault:
    """What goes wrong: a refusal, or after `after` events silence, a cut line, nonsense or an error event."""

    status: int | None = None
    body: str = ""
    after: int = 2
    silent: bool = False
    cut: bool = False
    event: str | None = None


@dataclass
class Wire:
    """The server; `seen` has the path, headers and body of every POST, `longest` is its own limit of an answer."""

    model: Model | None
    models: list[str] = field(default_factory=lambda: ["the-model"])
    version: str = "0.5.23"
    fault: Fault | None = None
    incremental: bool = False
    longest: int = 1 << 20
    seen: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)
    connections: int = 0

    def __enter__(self) -> Wire:
        wire = self
        self.stopped = threading.Event()

        class Handler(_Handler):
            served = wire

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.http.shutdown()
        self.http.server_close()


class _Handler(BaseHTTPRequestHandler):
    served: Wire
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        """A client that goes away, also between two requests, is no error: the tests own stderr."""
        with suppress(ConnectionError):
            super().handle()

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._whole(200, {"object": "list", "data": [{"id": name} for name in self.served.models]})
        elif self.path == "/server_info":
            self._whole(200, {"version": self.served.version})
        else:
            self._whole(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.served.seen.append((self.path, dict(self.headers), body))
        fault = self.served.fault
        if fault is not None and fault.status is not None:
            self._bytes(fault.status, fault.body.encode())
            return
        try:
            events = self._sglang(body) if self.path == "/generate" else self._chat(body)
            self._stream(events, fault)
        except _Refused as error:
            self._whole(400, {"object": "error", "error": {"message": str(error), "code": 400}})

    def _chat(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """vLLM's chat completions, or TensorRT-LLM's, which differ in how rows come and in whether ids go back."""
        model = self.served.model
        assert model is not None
        if body["model"] not in self.served.models:
            raise _Refused(f"The model `{body['model']}` does not exist.")
        rows: list[Tensor] = []
        messages = [
            message | {"content": [_take(part, rows) for part in message["content"]]}
            for message in body["messages"]
        ]
        ids = model.prompt(messages, rows, body.get("add_special_tokens", False))
        tokens = model.generate(ids, torch.cat(rows), torch.arange(len(ids))[None], self._settings(body))
        return self._deltas(model, tokens, ids, with_ids=body.get("return_token_ids", False))

    def _settings(self, asked: dict[str, Any], limit: str = "max_tokens") -> dict[str, Any]:
        return asked | {"max_tokens": min(asked[limit], self.served.longest)}

    @staticmethod
    def _deltas(
        model: Model, tokens: Iterator[int], prompt_ids: list[int], with_ids: bool
    ) -> Iterator[dict[str, Any]]:
        head: dict[str, Any] = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
        yield head | ({"prompt_token_ids": prompt_ids} if with_ids else {})
        ids: list[int] = []
        given = ""
        for token in tokens:
            ids.append(token)
            text = model.tokenizer.decode(ids, skip_special_tokens=True)
            whole = text[: -len(text) + len(given)] if text.endswith("\ufffd") else text[len(given) :]
            given += whole
            choice: dict[str, Any] = {"index": 0, "delta": {"content": whole}}
            yield {"choices": [choice | ({"token_ids": [token]} if with_ids else {})]}
        yield {"choices": [{"index": 0, "delta": {}, "finish_reason": model.reason(ids)}]}
        yield {"choices": [], "usage": {"completion_tokens": len(ids)}}

    def _sglang(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        model = self.served.model
        assert model is not None
        (picture,) = body["image_data"]
        assert picture["format"] == "precomputed_embedding"
        ids = body["input_ids"]
        positions = torch.tensor(picture["mrope_positions"])
        assert positions.shape == (3, len(ids))
        assert picture["mrope_position_delta"] == int(positions.max()) + 1 - len(ids)
        settings = self._settings(body["sampling_params"], "max_new_tokens")
        out: list[int] = []
        for token in model.generate(ids, torch.tensor(picture["feature"]), positions[:, None], settings):
            out.append(token)
            shown = [token] if self.served.incremental else list(out)
            yield {"text": None, "output_ids": shown, "meta_info": _meta(len(out), None)}
        shown = [] if self.served.incremental else out
        yield {"text": "", "output_ids": shown, "meta_info": _meta(len(out), {"type": model.reason(out)})}

    def _stream(self, events: Iterator[dict[str, Any]], fault: Fault | None) -> None:
        first = next(events)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._chunk(": a comment, which clients skip\n\n")
        self._chunk(f"data: {json.dumps(first)}\n\n")
        for number, event in enumerate(events, 1):
            if fault is not None and number >= fault.after:
                if fault.event is not None:
                    self._chunk(fault.event)
                if fault.silent:
                    self.served.stopped.wait(30)
                if fault.cut:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
            self._chunk(f"data: {json.dumps(event)}\n\n")
        self._chunk("data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _chunk(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _whole(self, status: int, body: dict[str, Any]) -> None:
        self._bytes(status, json.dumps(body).encode())

    def _bytes(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _Refused(Exception):  # noqa: N818
    pass


def _take(part: dict[str, Any], rows: list[Tensor]) -> dict[str, Any]:
    """A part of a message as the chat template wants it; the rows of a picture are put aside."""
    if part["type"] != "image_embeds":
        return part
    data = part["image_embeds"]
    data = data["data"] if isinstance(data, dict) else data
    rows.append(torch.load(io.BytesIO(base64.b64decode(data, validate=True)), weights_only=True))
    assert rows[-1].dim() == 2
    return {"type": "image"}


def _meta(count: int, finish: dict[str, Any] | None) -> dict[str, Any]:
    return {"completion_tokens": count, "finish_reason": finish}
