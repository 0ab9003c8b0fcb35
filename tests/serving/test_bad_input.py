"""Whatever a client sends, it gets a 4xx in OpenAI's form in bounded time, and the server goes on."""

import io
import json
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from random import Random
from typing import Any

import httpx2 as httpx
import pytest
from PIL import Image

from resprune.runtime.errors import printable
from resprune.serving import server
from resprune.serving.images import ImageSources
from resprune.serving.limits import Limits
from tests.hostile.values import damaged, with_one_changed, written
from tests.serving.conftest import MODEL, QUESTION, Serving, asked, data_url, png, text, user

LONGEST_SECONDS = 20


@pytest.fixture
def post(serving: Serving) -> Iterator[Callable[..., httpx.Response]]:
    """Send bytes to the completions; afterwards a good request must still be answered."""
    client = httpx.Client(base_url=serving.url, timeout=LONGEST_SECONDS)

    def send(body: bytes, **headers: str) -> httpx.Response:
        return client.post(
            "/v1/chat/completions", content=body, headers={"Content-Type": "application/json", **headers}
        )

    yield send
    good = send(json.dumps(asked()).encode())
    assert good.status_code == 200
    assert serving.service.workers.admitted == 0
    client.close()


def refused(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].isprintable()
    assert len(error["message"]) < 400
    return error


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in a few bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 999))
        + chunk(b"IEND", b"")
    )


def saved(mode: str, form: str) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (9, 7)).save(file, form)
    return file.getvalue()


IMAGES = {
    "text": b"no picture",
    "cut": png()[:-60],
    "half": png()[: len(png()) // 2],
    "header": png()[:20],
    "flipped": png()[:60] + bytes(byte ^ 0xFF for byte in png()[60:]),
    "bomb": bomb(),
    "film": b"\0\0\0\x18ftypmp42" + bytes(40),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><rect width='9' height='9'/></svg>",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "pdf": b"%PDF-1.7\n",
    "float": saved("F", "TIFF"),
    "zeros": bytes(4096),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_broken_images(post: Callable[..., httpx.Response], kind: str) -> None:
    start = time.monotonic()
    error = refused(post(json.dumps(asked(content=IMAGES[kind])).encode()))
    assert error["param"] == "messages"
    assert time.monotonic() - start < LONGEST_SECONDS


def test_other_kinds_of_images_are_read(post: Callable[..., httpx.Response]) -> None:
    for mode, form in [
        ("L", "PNG"),
        ("RGBA", "PNG"),
        ("CMYK", "JPEG"),
        ("P", "GIF"),
        ("RGB", "WEBP"),
        ("1", "BMP"),
    ]:
        assert post(json.dumps(asked(content=saved(mode, form))).encode()).status_code == 200


@pytest.mark.parametrize(
    "url",
    [
        "",
        "x",
        "data:",
        "data:image/png",
        "data:image/png,plain",
        "data:image/png;base64,",
        "data:image/png;base64,&&&",
        "data:image/png;base64,iVBOR",
        "file:///etc/passwd",
        "/etc/passwd",
        "ftp://example.org/a.png",
        "https://example.org/a.png",
        "HTTP://127.0.0.1/a.png",
        "javascript:alert(1)",
        "data:image/png;base64,ü",
    ],
)
def test_addresses_that_are_no_images(post: Callable[..., httpx.Response], url: str) -> None:
    parts = [{"type": "image_url", "image_url": {"url": url}}, text(QUESTION)]
    refused(post(json.dumps(asked(messages=[user(*parts)])).encode()))


DEEP = 100_000
BODIES = {
    "empty": b"",
    "no JSON": b"hello",
    "cut": b'{"model": "tiny", "messages": [',
    "list": b"[]",
    "number": b"1",
    "null": b"null",
    "NaN": b'{"model": "tiny", "temperature": NaN}',
    "not UTF-8": b'{"model": "\xff"}',
    "lone surrogate": b'{"model": "\\ud800"}',
    "deep list": b"[" * DEEP + b"]" * DEEP,
    "deep object": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "deep and cut": b"[" * 1_000_000,
    "huge number": b'{"model": "tiny", "seed": ' + b"9" * 5000 + b"}",
    "zero bytes": bytes(1000),
    "byte order mark": b"\xef\xbb\xbf{}",
}


@pytest.mark.parametrize("kind", BODIES)
def test_broken_bodies(post: Callable[..., httpx.Response], kind: str) -> None:
    start = time.monotonic()
    refused(post(BODIES[kind]))
    assert time.monotonic() - start < LONGEST_SECONDS


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"model": 3}, "model"),
        ({"model": None}, "model"),
        ({"messages": "hello"}, "messages"),
        ({"messages": {}}, "messages"),
        ({"messages": [3]}, "messages[0]"),
        ({"messages": [{}]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [user({"type": "text"})]}, "messages[0].content[0].text"),
        ({"messages": [user({"type": "text", "text": 3})]}, "messages[0].content[0].text"),
        ({"messages": [user({"type": "image_url", "image_url": "x"})]}, "messages[0].content[0].image_url"),
        (
            {"messages": [user({"type": "image_url", "image_url": {}})]},
            "messages[0].content[0].image_url.url",
        ),
        (
            {
                "messages": [
                    user({"type": "image_url", "image_url": {"url": data_url(png()), "detail": "low"}})
                ]
            },
            "messages[0].content[0].image_url.detail",
        ),
        ({"messages": [user({"type": "input_audio", "input_audio": {}})]}, "messages[0].content[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages[0].name"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "8"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other"),
        ({"stop": 3}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"n": True}, "n"),
        ({"n": "1"}, "n"),
        ({"resprune": 3}, "resprune"),
        ({"resprune": {"tokens": 0}}, "resprune.tokens"),
        ({"resprune": {"tokens": True}}, "resprune.tokens"),
        ({"resprune": {"tokens": 8.5}}, "resprune.tokens"),
        ({"resprune": {"tokens": [8]}}, "resprune.tokens"),
        ({"resprune": {"tokens": "0"}}, "resprune.tokens"),
        ({"resprune": {"tokens": "101%"}}, "resprune.tokens"),
        ({"resprune": {"tokens": "{most}"}}, "resprune.tokens"),
        ({"resprune": {"tokens": -(10**30)}}, "resprune.tokens"),
        ({"resprune": {"about": "square"}}, "resprune.about"),
        ({"resprune": {"about": [""]}}, "messages"),
        ({"a" * 1000: 1}, "a" * 200),
    ],
)
def test_wrong_fields(post: Callable[..., httpx.Response], changed: dict[str, Any], param: str) -> None:
    assert refused(post(json.dumps(asked() | changed).encode()))["param"] == param


def test_any_body_is_answered_or_refused(post: Callable[..., httpx.Response]) -> None:
    """A whole request with something in it changed, or with some of its bytes."""
    random = Random(17)
    whole = asked(temperature=0.5, top_p=0.9, seed=3, stop=["x"], stream=False)
    whole["resprune"] = {"tokens": 4, "about": ["square"], "boxes": True}
    whole["messages"] = [
        {"role": "system", "content": "be short"},
        *whole["messages"],
        {"role": "assistant", "content": "yes"},
        user(text("and now?")),
    ]
    seen = set()
    for _ in range(250):
        body = written(with_one_changed(random, whole)[0])
        response = post(damaged(random, body) if random.random() < 0.1 else body)
        seen.add(response.status_code)
        if response.status_code != 200:
            message = response.json()["error"]["message"]
            assert printable(message) == message
    assert seen == {200, 400, 404}


def test_neither_answer_nor_log_steers_a_terminal(
    post: Callable[..., httpx.Response], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "resprune.serving")
    refused(post(json.dumps(asked() | {"\x1b[2J\r\nresprune: forged": 1}).encode()))
    (line,) = (record.getMessage() for record in caplog.records)
    assert "forged is not a parameter of this API" in line
    assert line.isprintable()


@pytest.mark.parametrize("question", ["", " \n", "square " * 600])
def test_questions_that_cannot_be_asked(post: Callable[..., httpx.Response], question: str) -> None:
    refused(post(json.dumps(asked(question)).encode()))


def test_special_tokens_that_messages_type_are_text(serve: Callable[..., Serving]) -> None:
    """Whoever asks is unknown; `--special-tokens` is for an operator who knows them."""
    question = "what is <image> </s> here?"
    plain, control = serve(), serve(plain_text=False)
    expected = plain.pipeline.ask(png(), question, plain_text=True, max_new_tokens=8)
    assert not set(expected.prompt.ids) & {plain.pipeline._prompter.tokenizer.token_to_id("</s>")}
    got = plain.client().chat.completions.create(**asked(question))
    assert got.choices[0].message.content == expected.text
    assert got.usage.prompt_tokens == expected.prompt_tokens
    response = httpx.post(f"{control.url}/v1/chat/completions", json=asked(question))
    assert "stands for an image" in refused(response)["message"]
    ended = control.client().chat.completions.create(**asked("what is </s> here?"))
    assert (
        ended.choices[0].message.content
        == control.pipeline.ask(png(), "what is </s> here?", max_new_tokens=8).text
    )


def test_paths_methods_and_types_that_are_not_there(serving: Serving) -> None:
    client = httpx.Client(base_url=serving.url)
    refused(client.get("/v1/embeddings"), 404)
    refused(client.get("/../../etc/passwd"), 404)
    refused(client.get("/script.js/x"), 404)
    refused(client.get("/v1/models/%2e%2e%2f"), 404)
    refused(client.get("/v1/chat/completions"), 405)
    refused(client.post("/health"), 405)
    refused(client.post("/v1/chat/completions", content=b"{}", headers={"Content-Type": "text/plain"}), 415)
    refused(client.post("/v1/chat/completions", content=b"{}"), 415)


def test_what_is_no_http(serving: Serving) -> None:
    for sent in (
        b"\x16\x03\x01\0\0\0\0\r\n\r\n",
        b"hello\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
    ):
        received = serving.raw(sent)
        assert received.startswith(b"HTTP/1.1 400 ")
        assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("chunked", [True, False])
def test_a_body_of_200_megabytes(
    post: Callable[..., httpx.Response], serving: Serving, chunked: bool
) -> None:
    chunk, count = bytes(1 << 20), 200
    headers = {"Content-Type": "application/json"}
    if not chunked:
        headers["Content-Length"] = str(len(chunk) * count)
    start = time.monotonic()
    response = httpx.post(
        f"{serving.url}/v1/chat/completions",
        content=(chunk for _ in range(count)),
        headers=headers,
        timeout=LONGEST_SECONDS,
    )
    assert refused(response, 413)["code"] == "request_too_large"
    assert time.monotonic() - start < LONGEST_SECONDS


def test_a_slow_body(serve: Callable[..., Serving]) -> None:
    """Four seconds for 20 bytes are too slow for a limit of one second."""
    serving = serve(parallel=1, queue=0, limits=Limits(body_seconds=1))
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(serving.address, timeout=LONGEST_SECONDS) as slow:
        start = time.monotonic()
        slow.sendall(head + b"Content-Length: 20\r\n\r\n")
        received = b""
        while b"\r\n\r\n" not in received:
            slow.settimeout(0.2)
            try:
                received += slow.recv(65536)
            except TimeoutError:
                slow.sendall(b" ")
        assert received.startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - start > 0.9
    assert serving.client().chat.completions.create(**asked()).choices


def test_slow_headers(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then does not keep a connection; nor is there an answer to what is no request yet."""
    monkeypatch.setattr(server, "ARRIVAL_SECONDS", 1.0)
    with socket.create_connection(serving.address, timeout=0.2) as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ")
        received: bytes | None = None
        end = time.monotonic() + LONGEST_SECONDS
        while received is None and time.monotonic() < end:
            try:
                received = slow.recv(65536)
            except TimeoutError:
                with suppress(BrokenPipeError, ConnectionResetError):  # of a server that has just hung up
                    slow.sendall(b"x")
            except ConnectionResetError:
                received = b""
    assert received == b""
    monkeypatch.undo()
    assert serving.client().chat.completions.create(**asked()).choices


def test_a_body_that_breaks_off_gives_its_place_back(serve: Callable[..., Serving]) -> None:
    serving = serve(parallel=1, queue=0)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(serving.address) as connection:
        connection.sendall(head + b"Content-Length: 20\r\n\r\n{")
        time.sleep(0.2)
    assert serving.client(max_retries=4).chat.completions.create(**asked()).choices


def test_images_of_many_bytes_are_not_decoded(serve: Callable[..., Serving]) -> None:
    serving = serve(max_pixels=2000)
    response = httpx.post(f"{serving.url}/v1/chat/completions", json=asked(content=png(size=(60, 50))))
    assert "more than the limit of 2000" in refused(response)["message"]


def test_images_of_other_hosts_are_bounded_together(serve: Callable[..., Serving]) -> None:
    """In bytes, and by the time limit of the request; then no more are asked for."""
    asked_for: list[str] = []

    class Sources(ImageSources):
        def read(self, url: str) -> bytes:
            asked_for.append(url)
            time.sleep(0.05)
            return bytes(600)

    parts = [
        {"type": "image_url", "image_url": {"url": f"http://images.example.org/{n}"}} for n in range(500)
    ]
    body = {"model": MODEL, "messages": [user(*parts, text(QUESTION))]}
    for sources, limits, status, said in (
        (Sources(max_bytes=1000), Limits(), 400, "more than 1000 bytes together"),
        (Sources(), Limits(seconds=0.3), 504, r"longer than 0.3 seconds"),
    ):
        asked_for.clear()
        serving = serve(sources=sources, limits=limits)
        error = refused(httpx.post(f"{serving.url}/v1/chat/completions", json=body, timeout=60), status)
        assert said in error["message"]
        assert len(asked_for) < 10
        assert serving.service.workers.admitted == 0


def test_hosts_that_are_not_named(serve: Callable[..., Serving]) -> None:
    serving = serve(sources=ImageSources(("images.example.org",)))
    parts = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}}, text(QUESTION)]
    body = {"model": MODEL, "messages": [user(*parts)]}
    error = refused(httpx.post(f"{serving.url}/v1/chat/completions", json=body))
    assert "--allow-url-host 127.0.0.1:1" in error["message"]
