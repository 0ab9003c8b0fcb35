"""Answers of a server that one does not trust: `http.client` with an end, in time and in size, to all that it reads.

`http.client` bounds a line and the number of headers, and nothing else: a byte a second, trailers without an end,
interim answers one after the other and chunks of a negative size all keep it busy.

No library does this for us. Of nine hostile answers of `tests/runtime/test_hostile_server.py`, six (all but those of a
wrong chunk) still kept urllib3 2.8, requests 2.34 and httpx 0.28 busy after 5 s, with a time-out of 1.5 s: their
time-outs are between two bytes. They are 0.5, 2 and 4 MB more on a device.
"""

import http.client
import io
import socket
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any

MAX_ANSWER_BYTES = 256 << 20


@dataclass(frozen=True)
class Limits:
    """`silence` is the longest wait for the next byte, in seconds; `end` when all must be read, by `monotonic`."""

    silence: float
    end: float
    late: Callable[[], Exception]
    """What is raised at the end."""


def bounded_response(limits: Limits) -> Any:
    """What an `HTTPConnection` takes as `response_class`."""

    class Response(http.client.HTTPResponse):
        def __init__(self, sock: socket.socket, *arguments: Any, **named: Any) -> None:
            super().__init__(sock, *arguments, **named)
            self.fp.close()
            self.fp: Any = io.BufferedReader(_Bounded(sock, limits))

        # Private, and in every Python from 3.6 to 3.13. Under another name it would not be called, and an impossible
        # size would be an error of another sentence, for which the tests of hostile servers fail.
        def _read_next_chunk_size(self) -> int:
            size: int = super()._read_next_chunk_size()  # type: ignore[misc]
            if not 0 <= size <= MAX_ANSWER_BYTES:
                raise http.client.HTTPException("a chunk of an impossible size")
            return size

    return Response


class _Bounded(io.RawIOBase):
    """The bytes of a socket, up to a time and a number."""

    def __init__(self, sock: socket.socket, limits: Limits) -> None:
        self._socket = sock
        self._raw: Any = sock.makefile("rb", buffering=0)  # holds the socket when http.client lets it go
        self._limits = limits
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._limits.end - monotonic()
        if left <= 0:
            raise self._limits.late()
        self._socket.settimeout(min(self._limits.silence, left))
        try:
            count: int = self._raw.readinto(buffer)
        except TimeoutError:
            if left < self._limits.silence:
                raise self._limits.late() from None
            raise
        self._count += count
        if self._count > MAX_ANSWER_BYTES:
            raise http.client.HTTPException(f"an answer of more than {MAX_ANSWER_BYTES:,} bytes")
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()
