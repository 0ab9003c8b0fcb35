"""Any number of answers at once, in any threads: each is the one that is given alone."""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path

import psutil
import pytest

from resprune import Pipeline, ResPruneError
from resprune.runtime.answer import Answer
from tests.runtime.pipelines import with_manifest
from tests.runtime.ways import PICTURES, QUESTIONS, alone, wrong_at_once

THREADS, ROUNDS, WARM_UP = 8, 200, 20


@pytest.fixture(scope="module", params=[None, "ort"])
def vlm(
    request: pytest.FixtureRequest,
    tiny_bundle: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Pipeline]:
    bundle = tiny_bundle("demo", k=16, split=True, optimize=request.param)
    original = with_manifest(bundle, tmp_path_factory.mktemp("demo"), positions="original")
    with Pipeline.load(original, threads=1) as pipeline:
        yield pipeline


def test_answers_of_many_threads_are_those_given_alone(vlm: Pipeline) -> None:
    wanted = alone(vlm)
    assert len({str(tokens) for tokens in wanted.values()}) > 20, "shows nothing"
    process = psutil.Process()
    gc.collect()
    with ThreadPoolExecutor(THREADS) as threads:
        # Warmed up: every thread has its arenas.
        assert wrong_at_once(vlm, wanted, threads, range(THREADS), WARM_UP) == []
        before = process.memory_info().rss
        assert wrong_at_once(vlm, wanted, threads, range(THREADS, 2 * THREADS), ROUNDS) == []
    assert process.memory_info().rss - before < 30 << 20


def test_streams_in_turns_and_one_read_by_two_threads(vlm: Pipeline) -> None:
    def answers() -> list[Answer]:
        return [vlm.ask(path, QUESTIONS[0], max_new_tokens=8) for path in PICTURES]

    one_by_one = [answer.text for answer in answers()]
    pieces: list[list[str]] = [[] for _ in PICTURES]
    for row in zip_longest(*answers(), fillvalue=""):
        for said, piece in zip(pieces, row, strict=True):
            said.append(piece)
    assert ["".join(said) for said in pieces] == one_by_one
    shared = answers()
    start = threading.Barrier(2)

    def read() -> list[str]:
        start.wait()
        return ["".join(answer) for answer in shared]

    with ThreadPoolExecutor(2) as both:
        assert [future.result() for future in [both.submit(read), both.submit(read)]] == [
            one_by_one,
            one_by_one,
        ]


def test_an_answer_that_nobody_holds_frees_its_cache(vlm: Pipeline) -> None:
    started: list[weakref.ref[object]] = []
    decoder = vlm._backend.decoder
    start = decoder.start

    def remember(spliced: object) -> object:
        sequence = start(spliced)
        started.append(weakref.ref(sequence))
        return sequence

    decoder.start = remember
    try:
        unread = vlm.ask(PICTURES[0], QUESTIONS[0])
        begun = vlm.ask(PICTURES[0], QUESTIONS[0])
        next(iter(begun))
        closed = vlm.ask(PICTURES[0], QUESTIONS[0])
        closed.close()
        assert [alive() is None for alive in started] == [False, False, True]
        del unread, begun
        assert all(alive() is None for alive in started)
    finally:
        del decoder.start
    with pytest.raises(ResPruneError, match="closed before its end"):
        _ = closed.text
