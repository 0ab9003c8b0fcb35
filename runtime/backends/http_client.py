"""JSON over HTTP: an answer in one piece or as server-sent events, and every fault of the way as one sentence."""

import http.client
import json
import ssl
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread
from time import monotonic, sleep
from typing import Any
from urllib.parse import SplitResult, urlsplit

from resprune.runtime.arguments import number
from resprune.runtime.backends.bounded_http import Limits, bounded_response
from resprune.runtime.defaults import DEADLINE_SECONDS
from resprune.runtime.errors import ResPruneError, UnavailableError, one_line, shown

CONNECT_SECONDS = 10.0
LONGEST_SECONDS = 86_400  # a day; a socket takes no time-out of any length
# Only connecting is tried again: once a request is on its way, nobody knows how much of it has been done.
CONNECT_ATTEMPTS = 3
PAUSE_SECONDS = 0.25
MAX_BODY_BYTES = 4 << 20
"""Of an answer in one piece, and of an event."""


@dataclass(frozen=True)
class Server:
    """Where a server is: `url` may have a path, under which the API lies.

    `timeout` is the longest silence and `deadline` the longest whole exchange, in seconds. `key`, if there is one, is
    sent as a bearer token.
    """

    url: str
    timeout: float
    key: str | None = None
    deadline: float = DEADLINE_SECONDS

    def __post_init__(self) -> None:
        if not isinstance(self.url, str):
            raise ResPruneError(f"the address of a server should be a string, not {type(self.url).__name__}")
        if any(sign in self.url for sign in "@?#"):
            # Not shown: it may hold a secret, and messages are logged.
            raise ResPruneError(
                "the server's address should have no user name, password, query or fragment; give one like "
                "http://host:8000, and a key in RESPRUNE_SERVER_KEY"
            )
        try:
            split = self._split()
            host = (split.hostname or "").encode("idna")
            # What urlsplit lets pass, and no request can carry.
            plain = self.url.isascii() and self.url.isprintable() and " " not in self.url
            usable = split.scheme in ("http", "https") and bool(host) and plain
        except ValueError:  # a port that is no number, a broken IPv6 address, a label too long or empty
            usable = False
        if not usable:
            raise ResPruneError(
                f"{shown(self.url)} is not the address of a server; give one like http://host:8000"
            )
        for name, value in (("time-out", self.timeout), ("deadline", self.deadline)):
            if not 0 < number(value, f"the server's {name}") <= LONGEST_SECONDS:
                raise ResPruneError(
                    f"the server's {name} should be above 0 and at most {LONGEST_SECONDS:,} seconds, not {value:g}"
                )

    def get(self, path: str) -> Any:
        """The JSON at `path`; None where there is nothing (404)."""
        exchange = self._send("GET", path, None)
        try:
            if exchange.status() == http.client.NOT_FOUND:
                return None
            return exchange.whole()
        finally:
            exchange.close()

    def post(self, path: str, body: Any) -> "Exchange":
        """Send `body` as JSON; the answer is yet to be read."""
        return self._send("POST", path, json.dumps(body).encode())

    def _split(self) -> SplitResult:
        split = urlsplit(self.url)
        _ = split.port
        return split

    def _send(self, method: str, path: str, body: bytes | None) -> "Exchange":
        split = self._split()
        assert split.hostname is not None
        connection = (
            http.client.HTTPSConnection(
                split.hostname, split.port, timeout=CONNECT_SECONDS, context=ssl.create_default_context()
            )
            if split.scheme == "https"
            else http.client.HTTPConnection(split.hostname, split.port, timeout=CONNECT_SECONDS)
        )
        end = monotonic() + self.deadline
        self._connect(connection, end)
        connection.sock.settimeout(max(0.001, min(self.timeout, end - monotonic())))
        limits = Limits(self.timeout, end, self._late)
        connection.response_class = bounded_response(limits)
        headers = {"Content-Type": "application/json"} if body else {}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        exchange = Exchange(self, connection)
        try:
            with exchange.faults():
                connection.request(method, split.path.rstrip("/") + path, body, headers)
        except UnavailableError as error:
            exchange.close()
            raise (self._late() if monotonic() >= end else error) from None
        return exchange

    def _late(self) -> UnavailableError:
        return UnavailableError(
            f"{self.url} has not finished its answer in {self.deadline:g} seconds; ask for fewer tokens with "
            "--max-new-tokens, or wait longer with --server-deadline"
        )

    def _connect(self, connection: http.client.HTTPConnection, end: float) -> None:
        """Connect before `end`, by `monotonic`; in another thread, for nothing ends the search for a name."""
        for attempt in range(CONNECT_ATTEMPTS):
            connecting: Future[None] = Future()
            thread = Thread(target=_run, args=(connection.connect, connecting), daemon=True)
            thread.start()
            thread.join(max(0.0, end - monotonic()))
            if not connecting.done():
                raise self._late()
            try:
                return connecting.result()
            except OSError as error:
                reason = error.strerror or one_line(error)
            if attempt < CONNECT_ATTEMPTS - 1:
                sleep(min(PAUSE_SECONDS * 2**attempt, max(0.0, end - monotonic())))
        raise UnavailableError(
            f"{self.url} cannot be reached ({reason}); check the address and that the server runs"
        )


def _run(work: Callable[[], None], done: "Future[None]") -> None:
    """Let `done` have what came of `work`."""
    try:
        work()
    except BaseException as error:
        done.set_exception(error)
    else:
        done.set_result(None)


class Exchange:
    """A request that has been sent, and its answer."""

    def __init__(self, server: Server, connection: http.client.HTTPConnection) -> None:
        self._server = server
        self._connection = connection
        self._response: http.client.HTTPResponse | None = None

    def status(self) -> int:
        """The status of the answer; waits for it."""
        return self._begun().status

    def whole(self) -> Any:
        """The answer as JSON, read to its end; `ResPruneError`, with what the server said, unless it went well."""
        self._require_ok()
        with self.faults():
            text = self._begun().read(MAX_BODY_BYTES + 1)
        if len(text) > MAX_BODY_BYTES:
            raise self._garbage(text)
        return self._json(text)

    def begin(self) -> None:
        """Wait until the server has accepted the request; `ResPruneError`, with what it said, if it refuses."""
        self._require_ok()

    def events(self) -> Iterator[dict[str, Any]]:
        """The answer as it comes, one JSON object an event, up to the `[DONE]` that ends it.

        https://html.spec.whatwg.org/multipage/server-sent-events.html, of which these APIs use lines of `data:` alone.
        """
        response = self._begun()
        while True:
            with self.faults():
                line = response.readline(MAX_BODY_BYTES)
            if not line:
                raise UnavailableError(f"{self._server.url} cut its answer off before the end; ask again")
            field, _, value = line.rstrip(b"\r\n").partition(b":")
            if field != b"data":
                continue
            if value.strip() == b"[DONE]":
                return
            event = self._json(value)
            if not isinstance(event, dict):
                raise self._garbage(value)
            if event.get("error"):
                raise UnavailableError(f"{self._server.url} gave up the answer: {_said(event)}")
            yield event

    def close(self) -> None:
        """Hang up; the server then stops what it was doing for this request."""
        self._connection.close()
        if self._response is not None:
            self._response.close()

    @contextmanager
    def faults(self) -> Iterator[None]:
        """Turn what goes wrong on the way into one sentence."""
        try:
            yield
        except TimeoutError:
            raise UnavailableError(
                f"{self._server.url} has been silent for {self._server.timeout:g} seconds; see what holds it up, or "
                f"wait longer with --server-timeout"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise UnavailableError(
                f"the connection to {self._server.url} broke ({one_line(error)}); ask again"
            ) from None

    def _begun(self) -> http.client.HTTPResponse:
        if self._response is None:
            with self.faults():
                self._response = self._connection.getresponse()
        return self._response

    def _require_ok(self) -> None:
        response = self._begun()
        if response.status == http.client.OK:
            return
        with self.faults():
            text = response.read(MAX_BODY_BYTES)
        try:
            said = _said(json.loads(text))
        except (ValueError, RecursionError):
            said = one_line(text.decode(errors="replace"))
        raise UnavailableError(
            f"{self._server.url} refused with status {response.status}: {said or response.reason}"
        )

    def _json(self, text: bytes) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise self._garbage(text) from None

    def _garbage(self, text: bytes) -> UnavailableError:
        return UnavailableError(
            f"{self._server.url} answered {text[:60].decode(errors='replace')!a}, which is not what such a server "
            f"says; check the address and --server-format"
        )


def _said(body: Any) -> str:
    """The message of an error, wherever the server keeps it: OpenAI's `error.message`, FastAPI's `detail`, …."""
    while isinstance(body, dict):
        body = next((body[key] for key in ("error", "message", "detail") if body.get(key)), str(body))
    return one_line(body)
