"""Servers as a client finds them: a bundle behind a real socket, in a thread of this process."""

import base64
import io
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from resprune import Pipeline
from resprune.runtime.backends.backend import BackendFactory
from resprune.serving.server import Server, bind, url_of
from resprune.serving.service import Service

MODEL = "tiny"
QUESTION = "what colour is the square?"


@dataclass
class Serving:
    """A server that runs: its address, and what it is made of."""

    url: str
    service: Service
    server: Server
    pipeline: Pipeline

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": 60} | options
        )

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def raw(self, sent: bytes, *, seconds: float = 20) -> bytes:
        """What comes back for these bytes, up to the end of the connection or of `seconds`."""
        with socket.create_connection(self.address, timeout=seconds) as connection:
            connection.sendall(sent)
            received = b""
            try:
                while chunk := connection.recv(65536):
                    received += chunk
            except TimeoutError:
                pass
        return received


@pytest.fixture(scope="session")
def bundle(tiny_bundle: Callable[..., Path]) -> Path:
    return tiny_bundle("clip-llama", k=7, split=True)


@pytest.fixture
def serve(bundle: Path) -> Iterator[Callable[..., Serving]]:
    """Start a server with these options of `Service`; it is stopped after the test. `generator` is the pipeline's."""
    running: list[tuple[Server, threading.Thread, Service]] = []

    def start(generator: BackendFactory | None = None, **options: Any) -> Serving:
        pipeline = Pipeline.load(bundle, generator=generator)
        service = Service({MODEL: pipeline}, **options)
        server = Server(service.app, service.stop)
        bound = bind("127.0.0.1", 0)
        url = url_of(bound)
        thread = threading.Thread(target=server.run, args=([bound],))
        running.append((server, thread, service))
        thread.start()
        while not server.started:
            thread.join(0.01)
            assert thread.is_alive(), "the server did not start"
        return Serving(url, service, server, pipeline)

    yield start
    for server, thread, service in running:
        server.stop(at_once=True)
        thread.join(30)
        assert not thread.is_alive()
        with service:
            pass


@pytest.fixture
def serving(serve: Callable[..., Serving]) -> Serving:
    """A server as `resprune serve` starts it."""
    return serve()


def png(seed: int = 0, size: tuple[int, int] = (60, 50)) -> bytes:
    """An image file; another one for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def data_url(content: bytes, media: str = "image/png") -> str:
    return f"data:{media};base64,{base64.b64encode(content).decode()}"


def image(content: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(content)}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def asked(question: str = QUESTION, content: bytes | None = None, **fields: Any) -> dict[str, Any]:
    """The body of a request about one image."""
    messages = [user(image(png() if content is None else content), text(question))]
    return {"model": MODEL, "messages": messages, "max_tokens": 8} | fields
