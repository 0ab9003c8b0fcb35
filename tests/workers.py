"""Processes that exports share: starting Python and ONNX Runtime took a tenth of the tests' time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from resprune.exporter import export
from resprune.exporter.verify.ort_worker import OrtWorker


@contextmanager
def shared() -> Iterator[None]:
    """While it lasts, one process runs the graphs of all exports of a kind; an export that fails ends it."""
    running: dict[tuple[bool, bool], OrtWorker] = {}

    @contextmanager
    def worker(*, widened: bool = False, packed: bool = False) -> Iterator[OrtWorker]:
        kind = widened, packed
        one = running.pop(kind, None) or OrtWorker(widened=widened, packed=packed)
        try:
            yield one
        except BaseException:  # in the middle of an answer, perhaps
            end(one)
            raise
        running[kind] = one

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "OrtWorker", worker)
        try:
            yield
        finally:
            for one in running.values():
                end(one)


def end(worker: AbstractContextManager[OrtWorker]) -> None:
    worker.__exit__(None, None, None)
