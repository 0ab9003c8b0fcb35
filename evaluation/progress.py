"""How far long work has come: a bar on a terminal, and plain lines elsewhere, as in a log."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

from tqdm import tqdm

TENTH_SECONDS, LONGEST_SECONDS = 10.0, 60.0


@contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[int], object]]:
    """Gives a function that takes how many more of `total` answers there are.

    A line comes with each tenth, 10 seconds after the last one at the soonest, and after a minute in any case.
    """
    with tqdm(total=total, desc=what, unit="answer", leave=False, disable=None) as bar:
        yield _lines(total, what) if bar.disable else bar.update


def _lines(total: int, what: str) -> Callable[[int], None]:
    start = last = perf_counter()
    done = said = 0

    def update(more: int) -> None:
        nonlocal done, said, last
        done += more
        now = perf_counter()
        tenth = 10 * done // total > 10 * said // total
        if now - last >= (TENTH_SECONDS if tenth else LONGEST_SECONDS):
            said, last = done, now
            print(
                f"{what}: {done:,} of {total:,} answers in {now - start:.0f} s", file=sys.stderr, flush=True
            )

    return update
