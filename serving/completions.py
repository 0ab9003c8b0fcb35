"""POST /v1/chat/completions: from the request's first byte to the answer's last, within the server's limits."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from resprune.runtime.errors import FailedError, ResPruneError, UnavailableError
from resprune.serving.body import read_body
from resprune.serving.chat import ChatRequest, read_request
from resprune.serving.errors import ApiError
from resprune.serving.fetch import refused
from resprune.serving.images import ImageSources
from resprune.serving.limits import Limits
from resprune.serving.metrics import Metrics
from resprune.serving.model import Began, Ended, Event, Model
from resprune.serving.reply import DONE, Reply, event
from resprune.serving.workers import Abandoned, Place, Running, Workers, stopping

T = TypeVar("T")
GONE = 499  # nginx's status for a client that closed its request; only metrics and the log see it
log = logging.getLogger("resprune.serving")


class ClientGone(Exception):  # noqa: N818 - nobody's fault
    """Nobody is there to answer."""


@dataclass
class Exchange:
    """One request: its place in the queue, its job once there is one, and how it ended."""

    place: Place
    deadline: float
    model: str = "-"
    running: Running[Event] | None = None
    ended: Ended | None = None
    status: int | None = None
    fault: str = ""
    began: Began | None = None
    arrived: float = field(default_factory=monotonic)

    @property
    def job(self) -> Running[Event]:
        """The job, which runs or waits."""
        assert self.running is not None
        return self.running

    def close(self) -> None:
        """Free what the request holds, at once or when its job next checks."""
        if self.running is None:
            self.place.leave()
        else:
            self.running.stop()


class Completions:
    """Answers requests about `models`, of which each has a name."""

    def __init__(
        self,
        models: Mapping[str, Model],
        workers: Workers,
        sources: ImageSources,
        metrics: Metrics,
        limits: Limits,
    ) -> None:
        self._models = models
        self._workers = workers
        self._sources = sources
        self._metrics = metrics
        self._limits = limits

    async def answer(self, request: Request) -> Response:
        """The response to one request; `ApiError` if it is refused."""
        try:
            exchange = Exchange(self._workers.admit(), monotonic() + self._limits.seconds)
        except ApiError as error:
            self._metrics.requests.labels(str(error.status)).inc()
            raise
        try:
            chat = await self._submit(request, exchange)
            reply = Reply(chat.model)
            exchange.began = await while_connected(request, self._first(exchange))
            if chat.stream:
                events = self._stream(chat, reply, exchange, exchange.began)
                return _EventStream(events, partial(self._record, exchange))
            text, ended = await while_connected(request, self._rest(exchange))
            exchange.ended, exchange.status = ended, 200
            whole = reply.whole(exchange.began, text, ended, exchange.job.queue_ms)
        except BaseException as error:
            if isinstance(error, ApiError):
                exchange.status, exchange.fault = error.status, str(error)
            self._record(exchange)
            if isinstance(error, ClientGone):
                return Response(status_code=GONE)
            raise
        self._record(exchange)
        return JSONResponse(whole)

    async def _submit(self, request: Request, exchange: Exchange) -> ChatRequest:
        """Read the request, fetch its images, and put its job into the queue."""
        limits = self._limits
        body = await read_body(request, max_bytes=limits.body_bytes, seconds=limits.body_seconds)
        chat = await run_in_threadpool(read_request, body)
        model = find_model(self._models, chat.model)
        exchange.model = model.name
        contents = await while_connected(request, self._contents(chat.image_urls, exchange.deadline))
        exchange.running = exchange.place.run(partial(model.answer, chat, contents))
        return chat

    async def _contents(self, urls: list[str], deadline: float) -> list[bytes]:
        """The files of all images; `ApiError` if together they take too long or too many bytes."""
        contents: list[bytes] = []
        left = self._sources.max_bytes
        for url in urls:
            if monotonic() > deadline:
                raise self._late("send the images as data URLs")
            contents.append(await run_in_threadpool(self._sources.read, url))
            left -= len(contents[-1])
            if left < 0:
                raise refused(
                    f"the images have more than {self._sources.max_bytes} bytes together; send fewer, or smaller ones"
                )
        return contents

    async def _first(self, exchange: Exchange) -> Began:
        """Wait until the prompt is prefilled."""
        began = await self._next(exchange)
        assert isinstance(began, Began)
        return began

    async def _rest(self, exchange: Exchange) -> tuple[str, Ended]:
        """The whole text."""
        pieces: list[str] = []
        while isinstance(piece := await self._next(exchange), str):
            pieces.append(piece)
        assert isinstance(piece, Ended)
        await exchange.job.end()
        return "".join(pieces), piece

    async def _next(self, exchange: Exchange) -> Event:
        """What the job gives next; `ApiError` for what went wrong there, or if the time is over."""
        try:
            return await asyncio.wait_for(exchange.job.next(), max(0.0, exchange.deadline - monotonic()))
        except TimeoutError:
            raise self._late("ask for fewer tokens") from None
        except ApiError:
            raise
        except UnavailableError as error:
            raise ApiError(502, str(error), kind="server_error", code="backend_unavailable") from None
        except FailedError as error:
            raise ApiError(500, str(error), kind="server_error") from None
        except ResPruneError as error:
            raise ApiError(400, str(error), param="messages", code="invalid_value") from None
        except Abandoned:
            raise stopping() from None
        except Exception as error:
            log.error("an answer of %s failed", exchange.model, exc_info=error)
            raise ApiError(
                500, "the server failed to answer; its log says how", kind="server_error"
            ) from error

    def _late(self, advice: str) -> ApiError:
        return ApiError(
            504,
            f"the answer took longer than {self._limits.seconds:g} seconds; {advice}",
            kind="server_error",
            code="timeout",
        )

    async def _stream(
        self, chat: ChatRequest, reply: Reply, exchange: Exchange, began: Began
    ) -> AsyncGenerator[bytes]:
        """The answer as server-sent events; what goes wrong now is an event too."""
        usage = chat.stream_options is not None and chat.stream_options.include_usage
        try:
            yield event(reply.opening(began))
            while isinstance(piece := await self._next(exchange), str):
                if piece:
                    yield event(reply.piece(piece))
        except ApiError as error:
            exchange.status, exchange.fault = error.status, str(error)
            yield event(error.body())
            return
        assert isinstance(piece, Ended)
        await exchange.job.end()  # so that a client with its answer finds the place free
        exchange.ended = piece
        yield event(reply.closing(piece, exchange.job.queue_ms))
        if usage:
            yield event(reply.usage(began, piece))
        yield DONE
        exchange.status = 200

    def _record(self, exchange: Exchange) -> None:
        """Count a request that has ended, and free what it holds; without a status, its client has gone."""
        exchange.close()
        status = exchange.status or GONE
        metrics, began, ended = self._metrics, exchange.began, exchange.ended
        metrics.requests.labels(str(status)).inc()
        told = exchange.fault
        if began is not None:
            kept = sum(len(image["pick_order"]) for image in began.images)
            every = sum(image["num_tokens"] for image in began.images)
            metrics.queue_seconds.observe(exchange.job.queue_ms / 1e3)
            metrics.prompt_tokens.inc(began.prompt_tokens)
            metrics.kept_tokens.inc(kept)
            metrics.visual_tokens.inc(every)
            told = told or f"{kept} of {every} visual tokens"
        if ended is not None:
            metrics.completion_tokens.inc(ended.completion_tokens)
            metrics.first_token_seconds.observe(ended.timings["first_token"] / 1e3)
            rest = ended.timings["total"] - ended.timings["first_token"]
            if ended.completion_tokens > 1 and rest > 0:
                metrics.tokens_per_second.observe((ended.completion_tokens - 1) / rest * 1e3)
        log.info("%d %s %.2f s %s", status, exchange.model, monotonic() - exchange.arrived, told)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives; `ClientGone`, and `work` is cancelled, if the client goes away first."""
    working = asyncio.ensure_future(work)
    working.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody may be left to look
    leaving = asyncio.ensure_future(_leaving(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _leaving(request: Request) -> None:
    """Wait until the client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def find_model(models: Mapping[str, Model], name: str) -> Model:
    """The model of this name; `ApiError` with status 404 if there is none."""
    if name not in models:
        raise ApiError(
            404,
            f"there is no model {name[:100]!r} here; choose from {', '.join(models)}",
            param="model",
            code="model_not_found",
        )
    return models[name]


class _EventStream(StreamingResponse):
    """Server-sent events; `on_end` is called however they end, also before the first."""

    def __init__(self, events: AsyncGenerator[bytes], on_end: Callable[[], None]) -> None:
        super().__init__(
            events,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()
