"""Servers: whole answers of vLLM, TensorRT-LLM and SGLang with something changed, and what is no server at all."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

from tests.hostile.case import QUESTION, SHORT, Case, World
from tests.hostile.values import damaged, with_one_changed

JSON, EVENTS = "application/json", "text/event-stream"


def make(random: Random, folder: Path, world: World) -> Case:
    """A case about a server, which runs in a thread while the command does."""
    form = random.choice(["vllm", "trtllm", "sglang"])
    answers = {
        "models": _http(json.dumps(_changed(random, {"object": "list", "data": [{"id": "m"}]}, 0.1)), JSON),
        "info": _http(json.dumps(_changed(random, {"version": "0.9.0"}, 0.1)), JSON),
        "chat": _stream(random, [_chat_event(random) for _ in range(3)]),
        "generate": _stream(random, [_generate_event(random, count) for count in range(1, 4)]),
    }
    slow = random.random() < 0.05
    for name in list(answers):
        if random.random() < 0.3:
            answers[name] = damaged(random, answers[name])
        if random.random() < 0.2:
            answers[name] = _odd(random, answers[name])
    port = _free_port()
    bundle = world.bundles["clip-llama"]
    words = ["ask", str(bundle), str(world.photo), QUESTION, *SHORT, "--server", f"http://127.0.0.1:{port}"]
    words += ["--server-format", form, "--server-timeout", "2", "--server-deadline", "15"]
    what = f"{form} on {port}" + (", slow" if slow else "")
    return Case(
        "server", what, words, reason="it is the server's", around=lambda: _served(port, answers, slow)
    )


def _changed(random: Random, tree: Any, share: float) -> Any:
    return with_one_changed(random, tree)[0] if random.random() < share else tree


def _chat_event(random: Random) -> bytes:
    text = random.choice(["yes", " it is", "\x1b[2J\x07", "a\nb", "\u202e", "é" * 2000])
    event = {
        "prompt_token_ids": None,
        "choices": [{"index": 0, "delta": {"content": text}, "token_ids": [5, 6]}],
    }
    if random.random() < 0.5:
        del event["choices"][0]["token_ids"]  # type: ignore[index]
    return _event(_changed(random, event, 0.3))


def _generate_event(random: Random, count: int) -> bytes:
    event = {
        "output_ids": list(range(5, 5 + count)),
        "meta_info": {"completion_tokens": count, "finish_reason": None},
    }
    return _event(_changed(random, event, 0.3))


def _event(tree: Any) -> bytes:
    return b"data: " + json.dumps(tree).encode() + b"\n\n"


def _http(body: str, kind: str) -> bytes:
    content = body.encode("utf-8", "surrogatepass")
    return (
        f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\n\r\n".encode()
        + content
    )


def _stream(random: Random, events: list[bytes]) -> bytes:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {EVENTS}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    if random.random() < 0.8:
        events = [*events, b"data: [DONE]\n\n"]
    return head + b"".join(b"%x\r\n%s\r\n" % (len(event), event) for event in events) + b"0\r\n\r\n"


def _odd(random: Random, answer: bytes) -> bytes:
    """Another status, headers without end, sizes of chunks that are none, bodies without end."""
    head, _, body = answer.partition(b"\r\n\r\n")
    return random.choice(
        [
            b"HTTP/1.1 500 Oops\r\nContent-Length: 9\r\n\r\n\x1b[31mred\n",
            b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 401 No\r\nContent-Length: 2\r\n\r\n{}",
            b"HTTP/9.9 hello\r\n\r\n",
            b"SSH-2.0-OpenSSH_9.9\r\n",
            head + b"\r\n" + b"X-A: " + b"b" * 70_000 + b"\r\n\r\n" + body,
            head + b"\r\n" + b"X-A: b\r\n" * 5000 + b"\r\n" + body,
            head.replace(b"Content-Length: ", b"Content-Length: -") + b"\r\n\r\n" + body,
            head + b"\r\n\r\n" + b"-5\r\n" + body,
            head + b"\r\n\r\n" + b"ffffffffffffffff\r\n" + body,
            head + b"\r\n\r\n" + b"zz\r\n" + body,
            b"HTTP/1.1 200 OK\r\n\r\n" + b"data: " + b"x" * (40 << 20),
            b"HTTP/1.1 200 OK\r\n\r\n" + b": silence\n\n" * 200_000,
            b"",
        ]
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _served(port: int, answers: dict[str, bytes], slow: bool) -> Iterator[None]:
    stop = threading.Event()
    listener = socket.create_server(("127.0.0.1", port))
    listener.settimeout(0.1)

    def serve() -> None:
        while not stop.is_set():
            with suppress(OSError):
                connection, _ = listener.accept()
                threading.Thread(target=reply, args=(connection,), daemon=True).start()

    def reply(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.settimeout(5)
            asked = connection.recv(1 << 16)
            line = asked.split(b"\r\n", 1)[0]
            name = "models" if b"/v1/models" in line else "info" if b"info" in line else "generate"
            answer = answers["chat" if b"/chat/" in line else name]
            for start in range(0, len(answer), 40 if slow else 1 << 20):
                if stop.is_set():
                    return
                connection.sendall(answer[start : start + (40 if slow else 1 << 20)])
                if slow:
                    time.sleep(0.2)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        listener.close()
