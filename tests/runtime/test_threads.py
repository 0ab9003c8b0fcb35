"""Any number of answers at once, in any threads: each is the one that is given alone."""

import gc
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path

import psutil
import pytest

from resprune import Pipeline, ResPruneError
from resprune.exporter.export import export
from resprune.exporter.options import Options
from resprune.runtime.answer import Answer

ROOT = Path(__file__).parents[2]
PICTURES = sorted((ROOT / "demo" / "pictures").glob("*.png"))
QUESTIONS = ["What color is the large square?", "How many shapes are there?", "Is there a circle?"]
THREADS, ROUNDS, WARM_UP = 8, 200, 50
Ask = Callable[[Pipeline, Path, str], list[list[int]]]


def ask(vlm: Pipeline, path: Path, question: str) -> list[list[int]]:
    return [vlm.ask(path, question, max_new_tokens=8).token_ids]


def look(vlm: Pipeline, path: Path, question: str) -> list[list[int]]:
    view = vlm.look(path)
    return [view.ask(question, tokens=tokens, max_new_tokens=8).token_ids for tokens in (4, 16)]


def chat(vlm: Pipeline, path: Path, question: str) -> list[list[int]]:
    talk = vlm.look(path).chat()
    return [talk.ask(each, max_new_tokens=8).token_ids for each in (question, QUESTIONS[0])]


def batch(vlm: Pipeline, path: Path, question: str) -> list[list[int]]:
    answers = vlm.ask_batch([path, PICTURES[0]], [question, QUESTIONS[1]], max_new_tokens=8)
    return [answer.token_ids for answer in answers]


def abandon(vlm: Pipeline, path: Path, question: str) -> list[list[int]]:
    """A reader that stops after the first piece."""
    next(iter(vlm.ask(path, question, max_new_tokens=8)))
    return []


WAYS: tuple[Ask, ...] = (ask, look, chat, batch, abandon)


@pytest.fixture(scope="module", params=[None, "ort"])
def vlm(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, traced_once: None
) -> Iterator[Pipeline]:
    out = tmp_path_factory.mktemp("demo") / "bundle"
    export("demo", out, Options(k=16, split=True, positions="original", optimize=request.param))
    with Pipeline.load(out, threads=1) as pipeline:
        yield pipeline


def test_answers_of_many_threads_are_those_given_alone(vlm: Pipeline) -> None:
    assert len(PICTURES) == 6
    cases = [(way, path, question) for way in WAYS for path in PICTURES for question in QUESTIONS]
    alone = {case: case[0](vlm, case[1], case[2]) for case in cases}
    assert len({str(tokens) for tokens in alone.values()}) > 20, "shows nothing"
    process = psutil.Process()
    gc.collect()

    def work(seed: int, rounds: int = ROUNDS) -> list[str]:
        rng = random.Random(seed)
        wrong = []
        for _ in range(rounds):
            way, path, question = case = rng.choice(cases)
            if (found := way(vlm, path, question)) != alone[case]:
                wrong.append(f"{way.__name__} {path.name} {question}: {found} for {alone[case]}")
        return wrong

    with ThreadPoolExecutor(THREADS) as threads:
        assert not any(
            threads.map(work, range(THREADS), [WARM_UP] * THREADS)
        )  # warmed up: every thread has its arenas
        gc.collect()
        before = process.memory_info().rss
        assert [line for wrong in threads.map(work, range(THREADS, 2 * THREADS)) for line in wrong] == []
    gc.collect()
    assert process.memory_info().rss - before < 30 << 20


def test_streams_in_turns_and_one_read_by_two_threads(vlm: Pipeline) -> None:
    def answers() -> list[Answer]:
        return [vlm.ask(path, QUESTIONS[0], max_new_tokens=8) for path in PICTURES]

    alone = [answer.text for answer in answers()]
    pieces: list[list[str]] = [[] for _ in PICTURES]
    for row in zip_longest(*answers(), fillvalue=""):
        for said, piece in zip(pieces, row, strict=True):
            said.append(piece)
    assert ["".join(said) for said in pieces] == alone
    shared = answers()
    start = threading.Barrier(2)

    def read() -> list[str]:
        start.wait()
        return ["".join(answer) for answer in shared]

    with ThreadPoolExecutor(2) as both:
        assert [future.result() for future in [both.submit(read), both.submit(read)]] == [alone, alone]


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
