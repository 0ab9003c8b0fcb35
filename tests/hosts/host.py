"""A host in an environment of its own: installed from pinned requirements, started on 127.0.0.1, stopped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks import environments

HERE = Path(__file__).parent
WORK = HERE.parents[1] / "build" / "hosts"
START_SECONDS = 240.0
STOP_SECONDS = 20.0


def python_of(host: str) -> Path:
    """The Python of the environment that requirements-<host>.txt lists; a host that cannot be installed fails."""
    WORK.mkdir(parents=True, exist_ok=True)
    return environments.environment(host, WORK, described=HERE)


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listened on a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class Running:
    """A server that has been started; the end of the `with` block stops it and all that it started.

    `command` and the URL path `ready` are as the host has them; what it says goes into `log`.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], port: int, ready: str, log: Path
    ) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self._ready = ready
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )

    def __enter__(self) -> Running:
        end = time.monotonic() + START_SECONDS
        try:
            while not self._answers():
                assert self._process.poll() is None, f"the host ended:\n{self.tail()}"
                assert time.monotonic() < end, f"the host is not up after {START_SECONDS:g} s:\n{self.tail()}"
                time.sleep(0.5)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End it, gently at first."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            self.signal(number)
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                continue
        self.signal(signal.SIGKILL)  # what it started and left behind

    def signal(self, number: int) -> None:
        """Send a signal to it and to all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def tail(self) -> str:
        """The end of what it said."""
        return self.log.read_text(errors="replace")[-3000:]

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.url + self._ready, timeout=5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False
