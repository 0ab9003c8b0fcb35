"""The graphs of a bundle on their way to the disk, and their weights, which are compared as soon as they are there.

Writing waits for the disk and the next graph for the tracer, so on Linux a thread goes ahead with both while those
that are written are compared with PyTorch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

from tqdm import tqdm

from resprune.exporter.checkpoint.shards import StoredTensor
from resprune.exporter.trace.tracer import Traced, tensor_specs
from resprune.exporter.trace.weights import data_path, data_size, write_graph, write_weights
from resprune.exporter.verify.weights import Comparison
from resprune.runtime.bundle.manifest import FileSpec, GraphSpec
from resprune.runtime.bundle.precisions import Choice

Result = TypeVar("Result")


@contextmanager
def ahead() -> Iterator[Callable[[Iterable[Callable[[], Result]]], Iterator[Result]]]:
    """A function that returns what jobs return, in order; a thread does the next while the caller is busy with one.

    Elsewhere than on Linux each is done when it is asked for: there they trace, and nobody may build a model beside
    that (trace_ahead.py). Leaving the context waits for the job that is under way.
    """
    if sys.platform != "linux":
        yield lambda jobs: (job() for job in jobs)
        return
    with ThreadPoolExecutor(1) as thread:

        def start(jobs: Iterable[Callable[[], Result]]) -> Iterator[Result]:
            started = [thread.submit(job) for job in jobs]
            return (job.result() for job in started)

        try:
            yield start
        finally:
            thread.shutdown(cancel_futures=True)


class GraphWriter:
    """Writes graphs in the precisions of `choice` into `folder`/onnx.

    A context manager, which ends what is still being written.

    `graphs` and `files` are what the manifest says of them.
    """

    def __init__(self, folder: Path, choice: Choice, stored: Mapping[str, StoredTensor]) -> None:
        self.graphs: dict[str, GraphSpec] = {}
        self.files: dict[Path, FileSpec] = {}
        self._folder, self._choice, self._stored = folder, choice, stored
        self._comparisons: dict[Path, Comparison] = {}
        self._stack = ExitStack()
        self._over = Event()
        (folder / "onnx").mkdir()

    def write(self, name: str, traced: Traced, owner: Path | None = None) -> Path:
        """Write a graph and its weights; returns its path. Raises `OSError` if the disk is full.

        A graph of the same weights as `owner`, which is written, refers to its file instead.
        """
        kind = self._choice.of(name)
        path = self._folder / "onnx" / f"{name}{kind.suffix}.onnx"
        self.files |= write_graph(traced, path, owner)
        self._comparisons[path] = comparison = self._stack.enter_context(Comparison(path, self._stored))
        data = data_path(owner or path)
        with progress_bar(name, data_size(traced)) as bar:

            def progress(count: int, complete: int) -> None:
                if self._over.is_set():
                    raise RuntimeError(f"the export has ended while {path.name} was being written")
                bar.update(count)
                comparison.advance(complete)

            if owner is None:
                self.files |= write_weights(traced, path, self._stored, progress)
            else:
                progress(0, self.files[data].size)
        self.graphs[name] = GraphSpec(
            file=path.relative_to(self._folder).as_posix(),
            precision=kind.word,
            inputs=tensor_specs(traced.model.graph.input),
            outputs=tensor_specs(traced.model.graph.output),
            weights=data.relative_to(self._folder).as_posix() if data in self.files else None,
        )
        return path

    def compare(self) -> tuple[list[str], int, int]:
        """Weights that are not the checkpoint's, how many there are of all graphs, and how many bytes.

        Most have been compared when they were written.
        """
        wrong: list[str] = []
        total = 0
        size = sum(spec.size for path, spec in self.files.items() if path not in self._comparisons)
        with progress_bar("weights", size) as bar:
            for path, comparison in self._comparisons.items():
                names, count = comparison.finish(bar.update)
                wrong += [f"{name} in {path.name}" for name in names]
                total += count
        return wrong, total, size

    def __enter__(self) -> GraphWriter:
        return self

    def __exit__(self, *raised: object) -> None:
        self._over.set()
        self._stack.close()


def progress_bar(what: str, size: int) -> tqdm[Any]:
    """A bar in bytes, on a terminal."""
    return tqdm(total=size, desc=what, unit="B", unit_scale=True, leave=False, disable=None)
