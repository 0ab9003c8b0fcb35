"""docs/serve.md: its commands, as they are printed, get answers from a server at its address."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from resprune import Pipeline
from resprune.serving.cli import register_serve
from resprune.serving.server import Server, bind, url_of
from resprune.serving.service import Service

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8080"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def address(demo_bundle: Path) -> Iterator[str]:
    """The demo as the page serves it, at a free port."""
    with Service({"demo-k16": Pipeline.load(demo_bundle)}) as service:
        started, bound = threading.Event(), bind("127.0.0.1", 0)
        server = Server(service.app, service.stop, started.set)
        thread = threading.Thread(target=server.run, args=([bound],))
        url = url_of(bound)
        thread.start()
        assert started.wait(60)
        yield url
        server.stop()
        thread.join()


def test_curl_as_it_is_printed(address: str) -> None:
    models, answer = (
        json.loads(
            subprocess.run(
                ["bash", "-c", command.replace(ADDRESS, address)], cwd=ROOT, capture_output=True, check=True
            ).stdout
        )
        for command in blocks("sh")
    )
    assert [model["id"] for model in models["data"]] == ["demo-k16"]
    assert answer["choices"][0]["message"]["content"] == "black"
    assert len(answer["resprune"]["images"][0]["pick_order"]) == 8


def test_python_as_it_is_printed(address: str) -> None:
    (program,) = blocks("python")
    command = [sys.executable, "-c", program.replace(ADDRESS, address)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=dict(os.environ))
    assert done.stdout == "black\n"


def test_every_option_is_explained() -> None:
    import argparse

    subparsers = argparse.ArgumentParser().add_subparsers()
    register_serve(subparsers)
    options = [option for action in subparsers.choices["serve"]._actions for option in action.option_strings]
    told = set(re.findall(r"--[a-z-]+", PAGE))
    unsaid = {"--help", "--port", "--skip-hashes"}
    assert {option for option in options if option.startswith("--")} - told == unsaid
    assert all((ROOT / "docs" / path).exists() for path in re.findall(r"\]\((images/[^)]+)\)", PAGE))
