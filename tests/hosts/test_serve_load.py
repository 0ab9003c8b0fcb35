"""500 requests of 16 clients, of many lengths, some given up and some bad: none wrong, none lost, nothing leaks."""

import http.client
import json
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx
import psutil
import pytest

from resprune import Pipeline
from tests.hosts.demo import PICTURES
from tests.hosts.serve import served
from tests.serving.conftest import data_url

REQUESTS, CLIENTS = 500, 16
QUESTIONS = [
    "What color is the large square?",
    "Is there a circle?",
    "How many objects are there?",
    "square " * 60,
]
BAD: list[dict[str, Any]] = [{"n": 2}, {"model": "other"}, {"max_tokens": "many"}, {"messages": []}]


def body_of(model: str, image: str, question: str, tokens: int) -> dict[str, Any]:
    url = data_url((PICTURES / image).read_bytes())
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "resprune": {"tokens": tokens},
    }


def test_load(exported: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    bundle = exported(k=16, split=True)
    images = sorted(path.name for path in PICTURES.glob("*.png"))
    rng = random.Random(7)
    cases = [(rng.choice(images), rng.choice(QUESTIONS), rng.choice([1, 4, 16])) for _ in range(REQUESTS)]
    with Pipeline.load(bundle) as pipeline:
        expected = {
            case: pipeline.ask(PICTURES / case[0], case[1], tokens=case[2]).text for case in set(cases)
        }
    kinds = ["whole"] * (REQUESTS * 18 // 20) + ["abort"] * (REQUESTS // 20) + ["bad"] * (REQUESTS // 20)
    rng.shuffle(kinds)
    seconds: list[float] = []

    with served(bundle) as url:
        process = next(one for one in psutil.Process().children() if "serve" in one.cmdline())
        client = httpx.Client(base_url=url, timeout=60, limits=httpx.Limits(max_connections=CLIENTS))
        endpoint = "/v1/chat/completions"

        def whole(case: tuple[str, str, int], changed: dict[str, Any]) -> httpx.Response:
            """The answer; one that is told to come again does."""
            while True:
                response = client.post(endpoint, json=body_of(bundle.name, *case) | changed)
                if response.status_code != 429:
                    return response
                time.sleep(0.2 * random.random() * int(response.headers["retry-after"]))

        def one(number: int) -> str:
            case, kind = cases[number], kinds[number]
            start = time.monotonic()
            if kind == "bad":
                response = whole(case, BAD[number % len(BAD)])
                return (
                    "" if response.status_code in (400, 404) else f"{response.status_code} for bad {number}"
                )
            if kind == "abort":
                split = urlsplit(url)
                connection = http.client.HTTPConnection(split.hostname or "", split.port, timeout=60)
                changed = {"stream": True, "temperature": 2, "max_tokens": 500}
                sent = json.dumps(body_of(bundle.name, *case) | changed)
                connection.request("POST", endpoint, sent, {"Content-Type": "application/json"})
                if number % 2:
                    connection.getresponse().read(1)
                connection.close()
                return ""
            response = whole(case, {})
            seconds.append(time.monotonic() - start)
            text = (
                response.json()["choices"][0]["message"]["content"] if response.status_code == 200 else None
            )
            return "" if text == expected[case] else f"{response.status_code} {text!r} for {case}"

        def round_of(numbers: range) -> tuple[list[str], float, int]:
            with ThreadPoolExecutor(CLIENTS) as threads:
                wrong = [fault for fault in threads.map(one, numbers) if fault]
            deadline = time.monotonic() + 30
            while "resprune_requests_running 0.0\n" not in client.get("/metrics").text:
                assert time.monotonic() < deadline, "a sequence is still held"
                time.sleep(0.1)
            return wrong, process.memory_info().rss / 1e6, process.num_fds()

        warm = round_of(range(100))
        end = round_of(range(100, REQUESTS))
        metrics = client.get("/metrics").text
    assert warm[0] + end[0] == []
    assert len(seconds) == kinds.count("whole"), "none is lost"
    assert end[1] < warm[1] + 60, f"memory grew from {warm[1]:.0f} to {end[1]:.0f} MB"
    assert end[2] <= warm[2] + 3, f"descriptors grew from {warm[2]} to {end[2]}"
    assert 'status="500"' not in metrics
    seconds.sort()
    p50, p95 = seconds[len(seconds) // 2], seconds[int(len(seconds) * 0.95)]
    with capsys.disabled():
        print(
            f"\n{REQUESTS} requests, {CLIENTS} clients: p50 {p50 * 1e3:.0f} ms, p95 {p95 * 1e3:.0f} ms; "
            f"memory {warm[1]:.0f} to {end[1]:.0f} MB, descriptors {warm[2]} to {end[2]}"
        )
