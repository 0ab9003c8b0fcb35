"""Everything that serves a set of pipelines, put together."""

from collections.abc import Mapping
from datetime import datetime
from types import TracebackType

from resprune.runtime.defaults import MAX_PIXELS
from resprune.runtime.pipeline import Pipeline
from resprune.runtime.prompt.nouns import question_terms
from resprune.serving.app import Access, make_app
from resprune.serving.cache import ByteCache
from resprune.serving.completions import Completions
from resprune.serving.images import ImageSources
from resprune.serving.limits import CACHE_BYTES, PARALLEL, QUEUE, Limits
from resprune.serving.metrics import Metrics
from resprune.serving.model import Model, Seen
from resprune.serving.workers import Workers


class Service:
    """An ASGI application, `app`, over pipelines that it closes; `stop` makes it refuse what has not begun.

    `plain_text` takes special tokens that messages type as text, for anybody may write them.
    """

    def __init__(
        self,
        pipelines: Mapping[str, Pipeline],
        *,
        parallel: int = PARALLEL,
        queue: int = QUEUE,
        cache_bytes: int = CACHE_BYTES,
        max_pixels: int = MAX_PIXELS,
        plain_text: bool = True,
        sources: ImageSources | None = None,
        limits: Limits | None = None,
        access: Access | None = None,
    ) -> None:
        self._pipelines = pipelines
        question_terms("a square")  # loads the tagger, which the first request would wait for
        self.workers = Workers(parallel, queue)
        self.cache: ByteCache[Seen] = ByteCache(cache_bytes, lambda seen: seen.view.nbytes)
        self.metrics = Metrics()
        models = {
            name: Model(
                name,
                pipeline,
                self.cache,
                created=_created(pipeline),
                max_pixels=max_pixels,
                plain_text=plain_text,
            )
            for name, pipeline in pipelines.items()
        }
        completions = Completions(
            models, self.workers, sources or ImageSources(), self.metrics, limits or Limits()
        )
        self.app = make_app(models, completions, self.metrics, access or Access())
        watch = self.metrics.watch
        watch("requests_running", "Answers being written.", lambda: self.workers.running)
        watch("requests_waiting", "Requests in the queue.", lambda: self.workers.waiting)
        watch("image_cache_bytes", "Bytes of encoded images that are kept.", lambda: self.cache.nbytes)
        watch("image_cache_hits", "Images that were found encoded.", lambda: self.cache.hits)
        watch("image_cache_misses", "Images that had to be encoded.", lambda: self.cache.misses)

    def stop(self, at_once: bool = False) -> None:
        """Refuse what has not begun; `at_once` ends what runs as well. From any thread."""
        self.workers.stop(at_once=at_once)

    def __enter__(self) -> "Service":
        """The service itself; at the end of the block it stops, and its pipelines are closed."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for what runs, then close the pipelines."""
        self.workers.close()
        for pipeline in self._pipelines.values():
            pipeline.close()


def _created(pipeline: Pipeline) -> int:
    """When the bundle was exported, in seconds since 1970."""
    try:
        return int(datetime.fromisoformat(pipeline.manifest.created.replace("Z", "+00:00")).timestamp())
    except ValueError:  # no time at all
        return 0
