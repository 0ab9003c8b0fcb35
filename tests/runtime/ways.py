"""The ways to be answered, mixed in many threads: what each answers alone, and whether it still does."""

import gc
import random
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from resprune import Pipeline

PICTURES = sorted((Path(__file__).parents[2] / "demo" / "pictures").glob("*.png"))
QUESTIONS = ["What color is the large square?", "How many shapes are there?", "Is there a circle?"]
Ask = Callable[[Pipeline, Path, str], list[list[int]]]
Case = tuple[Ask, Path, str]


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


def hold(vlm: Pipeline, path: Path, question: str) -> list[list[int]]:
    """An answer that waits unread while others come and go."""
    held = vlm.ask(path, question, max_new_tokens=8)
    other = vlm.ask(path, QUESTIONS[2], max_new_tokens=8).token_ids
    return [other, held.token_ids]


def abandon(vlm: Pipeline, path: Path, question: str) -> list[list[int]]:
    """A reader that stops after the first piece."""
    next(iter(vlm.ask(path, question, max_new_tokens=8)))
    return []


WAYS: tuple[Ask, ...] = (ask, look, chat, batch, hold, abandon)


def alone(vlm: Pipeline, pictures: Iterable[Path] = PICTURES) -> dict[Case, list[list[int]]]:
    """Every way, picture and question → what is answered, one after another."""
    assert len(PICTURES) == 6
    cases = [(way, path, question) for way in WAYS for path in pictures for question in QUESTIONS]
    return {case: case[0](vlm, case[1], case[2]) for case in cases}


def wrong_at_once(
    vlm: Pipeline,
    wanted: Mapping[Case, list[list[int]]],
    threads: ThreadPoolExecutor,
    seeds: range,
    rounds: int,
) -> list[str]:
    """What is answered otherwise than `wanted`, of `rounds` cases drawn for each of the seeds, all at once."""
    cases = list(wanted)

    def work(seed: int) -> list[str]:
        rng = random.Random(seed)
        wrong = []
        for _ in range(rounds):
            way, path, question = case = rng.choice(cases)
            if (found := way(vlm, path, question)) != wanted[case]:
                wrong.append(f"{way.__name__} {path.name} {question}: {found} for {wanted[case]}")
        return wrong

    wrong = [line for lines in threads.map(work, seeds) for line in lines]
    gc.collect()
    return wrong
