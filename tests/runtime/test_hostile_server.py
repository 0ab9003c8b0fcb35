"""A server that sends whatever it likes: one line, or an answer within what was asked for; never a hang."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resprune.runtime.backends.http_client import Server
from resprune.runtime.backends.servers import server
from resprune.runtime.errors import ResPruneError, UnavailableError
from resprune.runtime.pipeline import Pipeline
from tests.runtime.bundles import one_sentence

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 36, 3), dtype=np.uint8)
OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
PLAIN, CHUNKED = OK + b"\r\n", OK + b"Transfer-Encoding: chunked\r\n\r\n"
STEPS, DEADLINE = 5, 1.5


def event(**choice: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": {}} | choice]}).encode() + b"\n\n"


def raw(ids: str) -> bytes:
    return b'data: {"choices": [{"delta": {}, "token_ids": %s}]}\n\n' % ids.encode()


def slowly(pieces: Iterable[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        time.sleep(0.05)
        yield piece


REFUSED: dict[str, tuple[Callable[[], Iterable[bytes]], str]] = {
    "a byte at a time": (lambda: slowly(chain([PLAIN], repeat(b"d"))), "has not finished its answer in 1.5 seconds"),
    "comments for ever": (lambda: slowly(chain([PLAIN], repeat(b": ping\n"))), "has not finished"),
    "no tokens for ever": (lambda: slowly(chain([PLAIN], repeat(event()))), "has not finished"),
    "headers byte by byte": (lambda: slowly(chain([OK + b"X: "], repeat(b"x"))), "has not finished"),
    "interim answers for ever": (lambda: chain(repeat(b"HTTP/1.1 100 Continue\r\n\r\n")), "has not finished|more than"),
    "trailers for ever": (
        lambda: chain([CHUNKED + b"0\r\n"], slowly(repeat(b"X: y\r\n"))), "has not finished|cut its answer off"
    ),
    "a chunk of a negative size": (lambda: [CHUNKED, b"-5\r\n", b"data: "], "broke"),
    "a chunk of a huge size": (lambda: [CHUNKED, b"F" * 40 + b"\r\n", b"data: "], "broke"),
    "a chunk of no size": (lambda: [CHUNKED, b"zz\r\n"], "cut its answer off"),
    "thousands of headers": (lambda: [OK, b"X: y\r\n" * 5000, b"\r\n"], "broke"),
    "a header of megabytes": (lambda: [OK, b"X: " + b"y" * (5 << 20), b"\r\n\r\n"], "broke"),
    "a status that is none": (lambda: [b"HTTP/1.1 twohundred\r\n\r\n"], "broke"),
    "an event of megabytes": (lambda: chain([PLAIN], repeat(b"data: " + b"x" * (1 << 20))), "not what such a server"),
    "a refusal of megabytes": (
        lambda: [b"HTTP/1.1 400 Bad\r\nContent-Length: 99999999999999999999\r\n\r\n", b"\x1b[31m no \x07" * (1 << 20)],
        "refused with status 400",
    ),
    "deep nesting": (lambda: [PLAIN, b"data: " + b"[" * 100_000 + b"\n\n"], "not what such a server says"),
    "an id of 1e999": (lambda: [PLAIN, raw("[1e999]")], "inf is no token id"),
    "an id of 10^5000": (lambda: [PLAIN, raw("[1" + "0" * 5000 + "]")], "not what such a server says"),
    "an id below 0": (lambda: [PLAIN, raw("[-1]")], "-1 is no token id"),
    "an id above 31 bits": (lambda: [PLAIN, raw("[4294967296]")], "is no token id"),
    "an id that is true": (lambda: [PLAIN, raw("[true]")], "True is no token id"),
    "ids that are none": (lambda: [PLAIN, raw("7")], "not one of vLLM's"),
    "an error with escapes": (
        lambda: [PLAIN, b'data: {"error": "\\u001b[2J\\u0007bad\\nend"}\n\n'], "gave up .*bad end"
    ),
}  # fmt: skip

HELD: dict[str, Callable[[], Iterable[bytes]]] = {
    "ids for ever": lambda: chain([PLAIN], repeat(event(token_ids=[9]))),
    "ids all at once": lambda: [PLAIN, event(token_ids=[9] * 100_000)],
    "text for ever": lambda: chain([PLAIN], repeat(event(delta={"content": "x"}))),
}


class Hostile:
    """Answers every request with the bytes of `made`, and hangs up."""

    def __init__(self, made: Callable[[], Iterable[bytes]]) -> None:
        self._made = made
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Hostile:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=[connection], daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            try:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += connection.recv(65536)
                left = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                left -= len(head) - head.index(b"\r\n\r\n") - 4
                while left > 0:
                    left -= len(connection.recv(65536))
                for piece in self._made():
                    connection.sendall(piece)
            except OSError:
                return  # the other side has had enough


def ask(bundle: Path, hostile: Hostile, deadline: float = 60) -> Any:
    far = server(hostile.url, model="m", timeout=60, deadline=deadline)
    with Pipeline.load(bundle, generator=far, threads=1) as pipeline:
        return pipeline.ask(PICTURE, "how many circles", max_new_tokens=STEPS, stream=False)


@pytest.fixture
def bundle(tiny_bundle: Callable[..., Path]) -> Path:
    return tiny_bundle("clip-llama", k=7, split=True)


@pytest.mark.parametrize("name", REFUSED)
def test_one_line_and_no_hang(bundle: Path, name: str) -> None:
    made, sentence = REFUSED[name]
    start = time.monotonic()
    with Hostile(made) as hostile, pytest.raises(ResPruneError, match=sentence) as caught:
        ask(bundle, hostile, DEADLINE if "has not finished" in sentence else 60)
    one_sentence(caught.value)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("lost", ["getaddrinfo", "create_connection"])
def test_the_deadline_holds_while_it_connects(monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    """A search for a name without an end, and a host that says nothing."""
    release = threading.Event()

    def wait(*arguments: Any, **named: Any) -> Any:
        release.wait(60)
        raise OSError("nothing there")

    monkeypatch.setattr(socket, lost, wait)
    far = Server("http://far.example.org", timeout=20.0, deadline=0.5)
    with pytest.raises(UnavailableError, match=r"has not finished its answer in 0\.5 seconds"):
        far.get("/v1/models")
    assert not release.is_set()
    release.set()


@pytest.mark.parametrize("name", HELD)
def test_an_answer_is_no_longer_than_was_asked_for(bundle: Path, name: str) -> None:
    with Hostile(HELD[name]) as hostile:
        answer = ask(bundle, hostile)
        if name.startswith("text"):
            assert answer.text == "x" * STEPS
        else:
            assert answer.token_ids == [9] * STEPS


@pytest.mark.parametrize(
    "url",
    ["http://me:secret@host:8000", "http://secret@h h", "http://host/?key=secret", "http://host#secret"],
)
def test_a_secret_in_the_address_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ResPruneError, match="should have no user name, password, query") as caught:
        server(url)
    assert "secret" not in one_sentence(caught.value)
