"""`resprune serve` as a process: its options, its key, and how it ends."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from resprune.runtime.errors import ResPruneError
from resprune.serving.app import is_local
from resprune.serving.cli import model_names, require_safe, serve_key
from tests.serving.conftest import asked

MAIN = "import sys; from resprune.runtime.cli import main; sys.exit(main(sys.argv[1:]))"
PROGRAM = [sys.executable, "-c", MAIN, "serve"]


class Process:
    """A server as a process of its own."""

    def __init__(self, *words: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [*PROGRAM, *words], stderr=subprocess.PIPE, text=True, env=os.environ | environment
        )
        self.said: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.search(r" at (http://\S+)", line):
                self.url = found[1]
                return
        raise AssertionError("".join(self.said))

    def end(self, number: int) -> tuple[int, str]:
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=30)
        return self.process.returncode, err


@pytest.fixture
def start() -> Iterator[Any]:
    started: list[Process] = []

    def run(*words: str, **environment: str) -> Process:
        started.append(Process(*words, **environment))
        return started[-1]

    yield run
    for one in started:
        one.process.kill()
        one.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_starts_answers_and_stops(bundle: Path, start: Any, number: int) -> None:
    running = start(str(bundle), "--port", "0")
    assert re.search(r"checking and opening .* [kM]B\)", running.said[0])
    assert "is ready after" in running.said[1]
    body = asked() | {"model": bundle.name}
    answered = httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=60)
    assert answered.json()["choices"][0]["message"]["content"]
    assert httpx.get(f"{running.url}/health").json() == {"status": "ok"}
    status, err = running.end(number)
    assert status == 0, err
    assert f"200 {bundle.name}" in err
    assert err.endswith("resprune: stopped\n")


def test_a_key_is_asked_for(bundle: Path, start: Any) -> None:
    running = start(str(bundle), "--port", "0", RESPRUNE_SERVE_KEY="open sesame".replace(" ", "-"))
    url = running.url
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "open-sesame"},
        {"Authorization": "Bearer ä"},
    ):
        for path in ("/v1/models", "/metrics"):
            raw = {name: value.encode() for name, value in headers.items()}
            refused = httpx.get(f"{url}{path}", headers=raw)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    assert httpx.post(f"{url}/v1/chat/completions", json=asked()).status_code == 401
    assert httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer open-sesame"}).status_code == 200
    assert httpx.get(f"{url}/").status_code == httpx.get(f"{url}/health").status_code == 200


def test_a_foreign_name_that_leads_here_is_refused(bundle: Path, start: Any) -> None:
    url = start(str(bundle), "--port", "0").url
    for path in ("/", "/v1/models", "/health"):
        assert httpx.get(f"{url}{path}", headers={"Host": "evil.example.org"}).status_code == 403
        assert httpx.get(f"{url}{path}", headers={"Host": "localhost:8080"}).status_code == 200


def test_names_of_this_machine() -> None:
    for host in (
        "localhost",
        "localhost:8080",
        "127.0.0.1:1",
        "127.0.0.1",
        "[::1]",
        "[::1]:8080",
        "a.localhost",
    ):
        assert is_local(host)
    for host in (
        "",
        "example.org",
        "localhost.example.org",
        "10.0.0.1:8080",
        "[fe80::1]:1",
        "127.0.0.1.nip.io",
    ):
        assert not is_local(host)


def test_another_host_needs_a_key_or_a_word() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.3.4.5"):
        assert require_safe(host, None, insecure=False)
    for host in ("0.0.0.0", "192.168.1.5", "::", "mine.example.org"):
        with pytest.raises(ResPruneError, match="RESPRUNE_SERVE_KEY"):
            require_safe(host, None, insecure=False)
        assert not require_safe(host, "key", insecure=False)
        assert not require_safe(host, None, insecure=True)


def test_keys_and_names_that_cannot_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for key in ("a b", "schlüssel", "a\nb"):
        monkeypatch.setenv("RESPRUNE_SERVE_KEY", key)
        with pytest.raises(ResPruneError, match="printable ASCII"):
            serve_key()
    monkeypatch.setenv("RESPRUNE_SERVE_KEY", " ")
    assert serve_key() is None
    assert model_names(["build/a", "b/"]) == {"a": "build/a", "b": "b/"}
    with pytest.raises(ResPruneError, match="both called a"):
        model_names(["build/a", "other/a"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--parallel", "0"], "--parallel should be 1 or more, not 0"),
        (["--queue", "-1"], "--queue should be 0 or more"),
        (["--time-limit", "nan"], "--time-limit should be 1 or more"),
        (["--port", "99999"], "--port should be 0 to 65535, not 99999"),
        (["--host", "no.such.host.invalid", "--insecure"], "not an address of this machine"),
        (["--host", "0.0.0.0"], "RESPRUNE_SERVE_KEY"),
        (
            ["--allow-url-host", "https://example.org"],
            "--allow-url-host should be a host such as example.org",
        ),
        (["--server-model", "x"], "--server-model is for --server"),
    ],
)
def test_wrong_options_are_one_line(
    bundle: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from resprune.runtime.cli import main

    assert main(["serve", str(bundle), "--port", "0", *words]) == 2
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if "opening" not in line]
    assert out == ""
    assert line.startswith("resprune: ")
    assert said in line


def test_a_port_that_is_taken_is_told_before_the_bundle_is_read(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from resprune.runtime.cli import main

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", str(bundle), "--port", str(port)]) == 2
    err = capsys.readouterr().err
    assert f"127.0.0.1:{port} cannot be used" in err
    assert err.count("\n") == 1
