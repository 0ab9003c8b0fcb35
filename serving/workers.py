"""A bounded queue in front of a few threads, and what a thread makes, event by event, in the event loop."""

import asyncio
import math
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from time import monotonic
from typing import Any, Generic, TypeVar

from resprune.serving.errors import ApiError, busy

T = TypeVar("T")
FIRST_GUESS_SECONDS = 2.0
LONGEST_RETRY_SECONDS = 60


class Abandoned(Exception):  # noqa: N818 - nobody's fault
    """Nobody waits for the rest of a job."""


class Workers:
    """`parallel` threads, and `queue` places for requests that wait for one; a request beyond these is refused.

    A place is taken when a request begins to arrive, so that what waits is bounded in memory as well. Everything but
    the jobs runs in the event loop.
    """

    def __init__(self, parallel: int, queue: int) -> None:
        self.parallel = parallel
        self.queue = queue
        self.admitted = 0
        self.running = 0
        self._threads = ThreadPoolExecutor(parallel, thread_name_prefix="answer")
        self._stopping = False
        self._jobs: set[Running[Any]] = set()
        self._seconds = FIRST_GUESS_SECONDS  # of a job, the later ones counting more

    @property
    def waiting(self) -> int:
        """How many requests have a place and no thread."""
        return self.admitted - self.running

    def admit(self) -> "Place":
        """Take a place; `ApiError` with status 429 if there is none, 503 if the server is stopping."""
        if self._stopping:
            raise stopping()
        if self.admitted >= self.parallel + self.queue:
            retry = min(
                LONGEST_RETRY_SECONDS, math.ceil(self._seconds * max(1, self.waiting) / self.parallel)
            )
            raise busy(
                429,
                f"the server answers {self.parallel} requests at once and {self.queue} more wait; try again later",
                "rate_limit_exceeded",
                retry,
            )
        return Place(self)

    def stop(self, *, at_once: bool = False) -> None:
        """Refuse what has not begun; what runs goes on to its end, unless it is to stop `at_once`. From any thread."""
        self._stopping = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        if at_once:
            for job in list(self._jobs):
                job.stop()

    def close(self) -> None:
        """Stop at once, and wait until no job runs."""
        self.stop(at_once=True)
        self._threads.shutdown()

    def _submit(self, job: "Running[Any]") -> "Future[None]":
        try:
            future = self._threads.submit(job.work)
        except RuntimeError:  # after shutdown
            raise stopping() from None
        self._jobs.add(job)
        return future

    def _ran(self, seconds: float) -> None:
        self._seconds += 0.2 * (seconds - self._seconds)


class Place:
    """A request's place in the queue, from its first byte to the end of its job."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._held = True
        workers.admitted += 1

    def leave(self) -> None:
        """Give the place back; it may have been before."""
        if self._held:
            self._held = False
            self._workers.admitted -= 1

    def run(self, job: "Callable[[Running[T]], Generator[T]]") -> "Running[T]":
        """Run a job when a thread is free; the place is given back at its end."""
        return Running(self, self._workers, job)


class Running(Generic[T]):
    """A job that waits or runs: `next` gives its events; `stop` it when nobody wants them any more."""

    def __init__(self, place: Place, workers: Workers, job: "Callable[[Running[T]], Generator[T]]") -> None:
        self._place = place
        self._workers = workers
        self._job = job
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[T | None, BaseException | None]] = asyncio.Queue()
        self._stopped = threading.Event()
        self._submitted = monotonic()
        self._started: float | None = None
        self._future = workers._submit(self)
        self._future.add_done_callback(self._dropped)

    def check(self) -> None:
        """For the job, between two of its stages: `Abandoned` if nobody wants the rest."""
        if self._stopped.is_set():
            raise Abandoned

    def stop(self) -> None:
        """Drop the job: at once if it waits, else when it next gives an event or checks."""
        self._stopped.set()
        self._future.cancel()

    async def next(self) -> T:
        """The job's next event; raises what the job raised, `StopAsyncIteration` after the last event."""
        event, error = await self._events.get()
        if error is not None:
            raise error
        if event is None:
            raise StopAsyncIteration
        return event

    async def end(self) -> None:
        """After the last event: wait until the job's thread and place are free."""
        with suppress(StopAsyncIteration):
            await self.next()

    @property
    def queue_ms(self) -> float:
        """Milliseconds that the job waited for a thread."""
        return ((self._started or monotonic()) - self._submitted) * 1e3

    def work(self) -> None:
        """Run the job; in a worker thread."""
        self._started = start = monotonic()
        self._tell(self._began)
        error: BaseException | None = None
        try:
            self.check()
            with closing(self._job(self)) as events:
                for event in events:
                    self._tell(self._events.put_nowait, (event, None))
                    self.check()
        except BaseException as raised:
            error = raised
        self._tell(self._ended, monotonic() - start, error)

    def _tell(self, function: Callable[..., None], *arguments: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server was ended at once
            self._loop.call_soon_threadsafe(function, *arguments)

    def _began(self) -> None:
        self._workers.running += 1

    def _ended(self, seconds: float, error: BaseException | None) -> None:
        self._workers.running -= 1
        self._workers._ran(seconds)
        self._left()
        self._events.put_nowait((None, error))

    def _left(self) -> None:
        self._workers._jobs.discard(self)
        self._place.leave()

    def _dropped(self, future: "Future[None]") -> None:
        """A job that never began, because its client has gone or the server is stopping."""
        if future.cancelled():
            self._tell(self._never_began)

    def _never_began(self) -> None:
        self._left()
        self._events.put_nowait((None, Abandoned() if self._stopped.is_set() else stopping()))


def stopping() -> ApiError:
    """The error of a request that comes, or still waits, while the server stops."""
    return busy(503, "the server is stopping; try again", "server_stopping", 5)
