"""What the server measures, for Prometheus: https://prometheus.io/docs/instrumenting/exposition_formats/."""

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
RATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self.requests = Counter(
            "resprune_requests",
            "Requests for an answer, by HTTP status; 499 is a client that went away.",
            ["status"],
            registry=self._registry,
        )
        self.queue_seconds = self._histogram("queue_seconds", "Wait for a free sequence.", SECONDS)
        self.first_token_seconds = self._histogram(
            "first_token_seconds",
            "From the start of the work to the first token, without the queue.",
            SECONDS,
        )
        self.tokens_per_second = self._histogram(
            "tokens_per_second", "Tokens of an answer after the first, per second.", RATES
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens that the language model prefilled.")
        self.completion_tokens = self._counter("completion_tokens", "Tokens of all answers.")
        self.kept_tokens = self._counter("visual_tokens_kept", "Visual tokens that went into prompts.")
        self.visual_tokens = self._counter("visual_tokens", "Visual tokens that these images have unpruned.")

    def watch(self, name: str, about: str, read: Callable[[], float]) -> None:
        """Add a gauge that is read when it is asked for."""
        Gauge(f"resprune_{name}", about, registry=self._registry).set_function(read)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, about: str) -> Counter:
        return Counter(f"resprune_{name}", about, registry=self._registry)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"resprune_{name}", about, buckets=buckets, registry=self._registry)
