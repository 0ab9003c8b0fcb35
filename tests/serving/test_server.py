"""The HTTP server alone: when it tells that it has started, and clients that take nothing of their answer."""

import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from resprune.serving import server
from resprune.serving.server import Server, bind


async def endless(scope: dict[str, Any], receive: object, send: Callable[..., Any]) -> None:
    """An answer that no buffer holds."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(1000):
        await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})


Start = Callable[..., tuple[Server, threading.Thread, tuple[str, int]]]


@pytest.fixture
def start() -> Iterator[Start]:
    running: list[tuple[Server, threading.Thread]] = []

    def run(**options: Any) -> tuple[Server, threading.Thread, tuple[str, int]]:
        bound, ready = bind("127.0.0.1", 0), threading.Event()
        address = bound.getsockname()

        def started() -> None:
            with socket.create_connection(address, timeout=20):  # refused before the server listens
                ready.set()

        one = Server(endless, lambda at_once: None, started, **options)
        thread = threading.Thread(target=one.run, args=([bound],))
        running.append((one, thread))
        thread.start()
        assert ready.wait(30)
        return one, thread, address

    yield run
    for one, thread in running:
        one.stop(at_once=True)
        thread.join(30)


def stalled(address: tuple[str, int]) -> socket.socket:
    """A client that has its answer's first bytes, and takes no more."""
    client = socket.create_connection(address, timeout=30)
    client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert client.recv(1)
    return client


def test_a_client_that_takes_nothing_is_cut_off(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "STALL_SECONDS", 0.5)
    one, thread, address = start()
    with stalled(address):
        one.stop()
        thread.join(30)
        assert not thread.is_alive()


def test_a_client_that_takes_nothing_does_not_keep_a_server_from_stopping(start: Start) -> None:
    one, thread, address = start(seconds=0.5)
    with stalled(address):
        one.stop()
        thread.join(30)
        assert not thread.is_alive()
