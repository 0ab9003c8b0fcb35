"""More requests than the server takes: what waits, what is refused, what is given up, and how it stops."""

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import openai
import pytest

from resprune.runtime.errors import FailedError, UnavailableError
from resprune.serving.errors import ApiError
from resprune.serving.limits import Limits
from resprune.serving.workers import Abandoned, Running, Workers
from tests.serving.conftest import Serving, asked, png

ENDLESS = {"max_tokens": 450, "temperature": 2, "seed": 1}


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Jobs:
    """Jobs that go on when they are told to."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.began: list[int] = []
        self.closed: list[int] = []

    def job(self, number: int) -> Callable[[Running[int]], Generator[int]]:
        def run(running: Running[int]) -> Generator[int]:
            self.began.append(number)
            try:
                yield number
                self.go.wait(20)
                yield number
            finally:
                self.closed.append(number)

        return run


async def events(running: Running[int]) -> list[int]:
    got: list[int] = []
    try:
        while True:
            got.append(await running.next())
    except StopAsyncIteration:
        return got


def test_so_many_run_so_many_wait_and_one_more_is_refused() -> None:
    async def main() -> None:
        workers, jobs = Workers(2, 3), Jobs()
        running = [workers.admit().run(jobs.job(number)) for number in range(5)]
        with pytest.raises(ApiError) as refused:
            workers.admit()
        assert refused.value.status == 429
        assert int(refused.value.headers["Retry-After"]) >= 1
        assert [await running[0].next(), await running[1].next()] == [0, 1]
        assert (workers.running, workers.waiting) == (2, 3)
        assert sorted(jobs.began) == [0, 1]
        running[3].stop()  # a client that waited has gone: its place is free at once
        with pytest.raises(Abandoned):
            await running[3].next()
        running.append(workers.admit().run(jobs.job(5)))
        jobs.go.set()
        assert [await events(one) for one in running[:3]] == [[0], [1], [2, 2]]
        assert await events(running[5]) == [5, 5]
        await events(running[4])
        assert sorted(jobs.began) == sorted(jobs.closed) == [0, 1, 2, 4, 5]
        assert (workers.admitted, workers.running) == (0, 0)
        workers.close()

    asyncio.run(main())


def test_stopping_ends_what_waits_and_not_what_runs() -> None:
    async def main() -> None:
        workers, jobs = Workers(1, 1), Jobs()
        first, second = (workers.admit().run(jobs.job(number)) for number in range(2))
        assert await first.next() == 0
        workers.stop()
        with pytest.raises(ApiError) as refused:
            await second.next()
        assert refused.value.status == 503
        with pytest.raises(ApiError):
            workers.admit()
        jobs.go.set()
        assert await events(first) == [0]
        assert workers.admitted == 0
        workers.close()

    asyncio.run(main())


def test_stopping_at_once_ends_what_runs() -> None:
    async def main() -> None:
        workers, jobs = Workers(1, 0), Jobs()
        running = workers.admit().run(jobs.job(0))
        assert await running.next() == 0
        workers.stop(at_once=True)
        jobs.go.set()
        with pytest.raises(Abandoned):
            await events(running)
        assert jobs.closed == [0]

    asyncio.run(main())


def test_a_job_that_fails_says_so_and_gives_its_place_back() -> None:
    def fail(running: Running[int]) -> Generator[int]:
        yield 1
        raise ValueError("broken")

    async def main() -> None:
        workers = Workers(1, 0)
        for _ in range(3):
            running = workers.admit().run(fail)
            assert await running.next() == 1
            with pytest.raises(ValueError, match="broken"):
                await running.next()
        assert workers.admitted == 0
        workers.close()

    asyncio.run(main())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_sequence(serve: Callable[..., Serving], stream: bool) -> None:
    serving = serve(parallel=1, queue=1)
    connection = http.client.HTTPConnection(*serving.address, timeout=20)
    body = json.dumps(asked(stream=stream, **ENDLESS))
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    until(lambda: serving.service.workers.running == 1)
    if stream:
        assert connection.getresponse().read(10)
    connection.close()
    until(lambda: serving.service.workers.admitted == 0)
    assert serving.service.metrics.requests.labels("499")._value.get() == 1
    assert serving.client().chat.completions.create(**asked()).choices


def test_a_client_that_goes_away_while_it_waits(serve: Callable[..., Serving]) -> None:
    serving = serve(parallel=1, queue=1)
    headers = {"Content-Type": "application/json"}
    first, second = (http.client.HTTPConnection(*serving.address, timeout=20) for _ in range(2))
    first.request("POST", "/v1/chat/completions", json.dumps(asked(stream=True, **ENDLESS)), headers)
    until(lambda: serving.service.workers.running == 1)
    second.request("POST", "/v1/chat/completions", json.dumps(asked(**ENDLESS)), headers)
    until(lambda: serving.service.workers.waiting == 1 or serving.service.workers.running == 0)
    second.close()
    until(lambda: serving.service.workers.waiting == 0)
    first.close()
    until(lambda: serving.service.workers.admitted == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_the_time_limit(serve: Callable[..., Serving], stream: bool) -> None:
    serving = serve(parallel=1, queue=0, limits=Limits(seconds=0.01))
    create = serving.client().chat.completions.create
    with pytest.raises(openai.APIError, match=r"longer than 0\.01 seconds"):
        list(create(**asked(stream=stream, **ENDLESS)))
    until(lambda: serving.service.workers.admitted == 0)


def test_answers_that_are_written_at_once_are_each_their_own(serve: Callable[..., Serving]) -> None:
    serving = serve(parallel=4, queue=40)
    client = serving.client(max_retries=0)
    questions = ["what colour is the square?", "is there a circle?", "how many?", "where is the table?"]
    cases = [(question, seed) for question in questions for seed in range(4)]
    expected = {
        case: serving.pipeline.ask(png(case[1]), case[0], max_new_tokens=24, stream=False).text
        for case in cases
    }

    def answer(case: tuple[str, int]) -> str:
        question, seed = case
        got = client.chat.completions.create(**asked(question, png(seed), max_tokens=24))
        return got.choices[0].message.content or ""

    with ThreadPoolExecutor(16) as threads:
        got = list(threads.map(answer, cases * 2))
    assert got == [expected[case] for case in cases * 2]


def test_a_server_that_stops_finishes_what_runs(serve: Callable[..., Serving]) -> None:
    serving = serve(parallel=1, queue=2)
    whole = serving.pipeline.ask(
        png(), "what colour is the square?", max_new_tokens=450, temperature=2.0, seed=1
    ).text
    with ThreadPoolExecutor(2) as threads:
        client = serving.client()
        running = threads.submit(client.chat.completions.create, **asked(**ENDLESS))
        until(lambda: serving.service.workers.running == 1)
        waiting = threads.submit(client.chat.completions.create, **asked(**ENDLESS))
        until(lambda: serving.service.workers.waiting == 1)
        serving.server.stop()
        assert running.result().choices[0].message.content == whole
        with pytest.raises(openai.InternalServerError) as refused:
            waiting.result()
        assert refused.value.status_code == 503
        assert int(refused.value.response.headers["retry-after"]) > 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{serving.url}/health")


def test_a_server_that_stops_waits_for_no_body(serve: Callable[..., Serving]) -> None:
    serving = serve()
    with socket.create_connection(serving.address, timeout=20) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 20\r\n\r\n{"
        )
        until(lambda: serving.service.workers.admitted == 1)
        serving.server.stop()
        assert connection.recv(1) == b""
    until(lambda: serving.service.workers.admitted == 0)


def test_metrics(serving: Serving) -> None:
    client = serving.client()
    client.chat.completions.create(**asked())
    list(client.chat.completions.create(**asked(stream=True)))
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**asked(n=3))
    response = httpx.get(f"{serving.url}/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = dict(line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#"))
    value = {name: float(number) for name, number in lines.items()}
    assert value['resprune_requests_total{status="200"}'] == 2
    assert value['resprune_requests_total{status="400"}'] == 1
    assert value["resprune_visual_tokens_kept_total"] == 2 * 7
    assert value["resprune_visual_tokens_total"] == 2 * 16
    assert value["resprune_completion_tokens_total"] == 2 * 8
    assert value["resprune_first_token_seconds_count"] == value["resprune_queue_seconds_count"] == 2
    assert value["resprune_tokens_per_second_count"] == 2
    assert value["resprune_requests_running"] == value["resprune_requests_waiting"] == 0
    assert value["resprune_image_cache_misses"] == value["resprune_image_cache_hits"] == 1
    assert value["resprune_image_cache_bytes"] == serving.service.cache.nbytes > 0


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (UnavailableError("http://host:8000 cannot be reached"), 502, "cannot be reached"),
        (FailedError("the decoder gave NaN"), 500, "gave NaN"),
        (KeyError("x"), 500, "its log says how"),
    ],
)
def test_what_fails_behind_the_server(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int, says: str
) -> None:
    def start(*_: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(serving.pipeline._backend, "start", start)
        with pytest.raises(openai.InternalServerError) as raised:
            serving.client().chat.completions.create(**asked())
        assert raised.value.status_code == status
        assert says in str(raised.value)
    assert serving.client().chat.completions.create(**asked()).choices, "the server goes on"
