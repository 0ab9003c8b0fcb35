"""Images from addresses: named hosts alone, never a private network, and the checked address is the one asked."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import sleep

import pytest

from resprune.serving import fetch as fetching
from resprune.serving.errors import ApiError
from resprune.serving.fetch import fetch, is_public

HOSTS = ("images.example.org", "images.example.org:8443")


def error_of(url: str, hosts: tuple[str, ...] = HOSTS, **limits: float) -> str:
    with pytest.raises(ApiError) as raised:
        fetch(url, hosts, max_bytes=int(limits.get("max_bytes", 1000)), seconds=limits.get("seconds", 5))
    assert raised.value.status == 400
    assert str(raised.value).isprintable()
    return str(raised.value)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.9.9.9", "10.0.0.1", "172.16.3.4", "192.168.1.1", "169.254.169.254", "0.0.0.0"),
        *("100.64.0.1", "224.0.0.1", "255.255.255.255", "198.18.0.1", "192.0.2.1"),
        *("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1", "2001:db8::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1", "64:ff9b::a00:1"),
    ],
)
def test_private_addresses(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "http://other.example.org/a.png",
        "http://images.example.org:8080/a.png",
        "http://images.example.org.evil.com/a.png",
        "http://evil.com/images.example.org",
        "http://127.0.0.1/",
        "http://2130706433/",
        "http://[::1]/",
    ],
)
def test_hosts_that_are_not_named(url: str) -> None:
    assert "--allow-url-host" in error_of(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://user:secret@images.example.org/a.png",
        "http://images.example.org:99999/",
        "http://images.example.org:0/",
        "http:///a.png",
        "http://[::1/",
        "http://images.example.org/a b.png",
        "http://images.example.org/\r\nX: y",
        "ftp://images.example.org/",
    ],
)
def test_addresses_that_are_none(url: str) -> None:
    assert "not one of http or https" in error_of(url)


@pytest.fixture
def resolves(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Let the named host have these addresses, each time it is asked the next list."""

    def answer(*lists: list[str]) -> list[str]:
        asked: list[str] = []

        def getaddrinfo(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
            asked.append(host)
            addresses = lists[min(len(asked), len(lists)) - 1]
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

        monkeypatch.setattr(fetching.socket, "getaddrinfo", getaddrinfo)
        return asked

    return answer


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["8.8.8.8", "10.0.0.1"], ["::1"], []])
def test_a_named_host_with_a_private_address(
    resolves: Callable[..., list[str]], addresses: list[str]
) -> None:
    resolves(addresses)
    assert "private address" in error_of("http://images.example.org/a.png")


@pytest.fixture
def website(monkeypatch: pytest.MonkeyPatch, resolves: Callable[..., list[str]]) -> Iterator[list[str]]:
    """images.example.org is at 127.0.0.1, which counts as public here; the paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.headers['Host']}{self.path}")
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "http://127.0.0.1/secret")
                self.end_headers()
                return
            body = b"x" * (5000 if self.path == "/large" else 50)
            self.send_response(200 if self.path != "/missing" else 404)
            if self.path == "/headers":
                self.flush_headers()
                with suppress(OSError):  # of a client that has hung up
                    for number in range(50):
                        self.wfile.write(f"X-{number}: x\r\n".encode())
                        sleep(0.1)
                return
            if self.path != "/endless":
                self.send_header("Content-Length", str(len(body) + (self.path == "/cut")))
            self.end_headers()
            if self.path == "/slow":
                with suppress(OSError):
                    for _ in range(50):
                        self.wfile.write(b"x")
                        sleep(0.1)
            elif self.path == "/silent":
                sleep(3)
            else:
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setitem(fetching.PORTS, "http", server.server_address[1])
    monkeypatch.setattr(fetching, "is_public", lambda address: address == "127.0.0.1")
    resolves(["127.0.0.1"], ["8.8.8.8"])
    yield asked
    server.shutdown()
    server.server_close()


def test_an_image_is_fetched_from_the_address_that_was_checked(website: list[str]) -> None:
    """A second look at the name would lead elsewhere."""
    found = fetch("http://images.example.org/a.png?b=c", HOSTS, max_bytes=1000, seconds=5)
    assert found == b"x" * 50
    (asked,) = website
    assert asked.startswith("images.example.org:")
    assert asked.endswith("/a.png?b=c")


def test_an_answer_that_ends_with_the_connection(website: list[str]) -> None:
    assert fetch("http://images.example.org/endless", HOSTS, max_bytes=1000, seconds=5) == b"x" * 50


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("moved", "status 302"),
        ("missing", "status 404"),
        ("large", "more than 1000 bytes"),
        ("cut", "cut the image off"),
        ("slow", "takes longer than 0.5 seconds"),
        ("headers", "takes longer than 0.5 seconds"),
        ("silent", "takes longer than 0.5 seconds"),
    ],
)
def test_what_a_host_may_answer(website: list[str], path: str, said: str) -> None:
    seconds = 0.5 if "takes longer" in said else 60
    assert said in error_of(f"http://images.example.org/{path}", seconds=seconds)
    assert len(website) == 1, "a redirect is not followed"


def test_a_host_that_does_not_answer(
    resolves: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolves(["127.0.0.1"])
    monkeypatch.setattr(fetching, "is_public", lambda address: True)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        assert "cannot be read" in error_of(
            f"http://images.example.org:{port}/", (f"images.example.org:{port}",)
        )
