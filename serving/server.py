"""The HTTP server: uvicorn with a limit on how long a request may take to arrive, and one way to stop."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from resprune.runtime.errors import ResPruneError
from resprune.serving.errors import error_body
from resprune.serving.limits import Limits

# A request whose headers, or whose body after an early answer, take longer is cut off. The application's own limit on
# a body's time is shorter, and answers with a status.
ARRIVAL_SECONDS = 60.0
# A client that takes nothing of its answer for so long is cut off.
STALL_SECONDS = 60.0
KEEP_ALIVE_SECONDS = 15


class Server(uvicorn.Server):
    """Stops on SIGTERM and SIGINT: `on_stop` is told, what runs is finished in `seconds`, and `run` returns.

    A second signal ends it at once, and `on_stop` is told that with True. `on_start` is called when it listens.
    """

    def __init__(
        self,
        app: Callable[..., Any],
        on_stop: Callable[[bool], None],
        on_start: Callable[[], None] = lambda: None,
        seconds: float = Limits.seconds,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=_TimedProtocol,
                ws="none",
                lifespan="off",
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=seconds,  # type: ignore[arg-type]  # asyncio takes any number
            )
        )
        self._on_stop = on_stop
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        await super().startup(sockets)
        self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Signal handler."""
        self.stop(at_once=self.should_exit)

    def stop(self, *, at_once: bool = False) -> None:
        """Take no more requests, and return from `run` when those that run are answered; from any thread."""
        self.should_exit = True
        self.force_exit = at_once
        # Not in the signal handler itself, which may have interrupted the queue in the middle of something.
        threading.Thread(target=self._on_stop, args=(at_once,)).start()


def bind(host: str, port: int) -> socket.socket:
    """A socket at `host` and `port`, which does not listen yet; `ResPruneError` if it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, OverflowError) as error:
        raise ResPruneError(f"{host} is not an address of this machine ({_reason(error)})") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        bound.close()
        raise ResPruneError(
            f"{host}:{port} cannot be used ({_reason(error)}); choose another with --port or --host"
        ) from None
    return bound


def url_of(bound: socket.socket) -> str:
    """The address of a server at this socket, for a browser."""
    host, port = str(bound.getsockname()[0]), bound.getsockname()[1]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - what is shown, not bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


class _TimedProtocol(H11Protocol):
    """Closes a connection whose request has not arrived in `ARRIVAL_SECONDS`; garbage gets an error in OpenAI's form.

    Of uvicorn's it uses `conn`, `loop`, `transport` and the seven methods, as in 0.30 to 0.54.
    """

    _late: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._time()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()

    def shutdown(self) -> None:
        if self.conn.their_state is h11.SEND_BODY:  # what has not arrived yet would be refused
            self.transport.close()
        else:
            super().shutdown()

    def _time(self) -> None:
        """Time from the first byte that is missing to the last."""
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._cancel()
        elif self._late is None:
            self._late = self.loop.call_later(ARRIVAL_SECONDS, self.transport.close)

    def _cancel(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer is under way
            self.transport.close()
            return
        body = json.dumps(error_body(msg, "invalid_request_error")).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
