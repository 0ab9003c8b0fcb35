"""What the command line does with the terminal: one line for an error, quiet libraries, and Ctrl-C."""

import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from threading import Lock, Timer
from types import FrameType
from typing import TextIO

from resprune.runtime.errors import printable


def bytes_text(count: float) -> str:
    """A number of bytes in kB, MB or GB, which are powers of 1000: 9.9 MB, 819 MB, 14.1 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.{0 if count >= 100 * scale else 1}f} {unit}"
    return f"{count:.0f} B"


def complain(message: object) -> None:
    """Write `resprune: message` to stderr, as one line; nothing where stderr is closed."""
    line = re.sub(r"[\n\t\u2028\u2029]+", " ", printable(str(message)))
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            print(f"resprune: {line}", file=sys.stderr, flush=True)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Drop what libraries write to file descriptor 2: ONNX Runtime's log, libtiff's warnings, Rust's panics.

    Our own messages still arrive: `sys.stderr` writes to a copy of the descriptor in the meantime.
    """
    ours = sys.stderr
    try:
        real = os.dup(2)
    except OSError:  # stderr is closed
        yield
        return
    with ExitStack() as undo:
        undo.callback(os.close, real)
        undo.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # NumPy's, of weights and pixels that it cannot convert
        if _descriptor(ours) == 2:
            sys.stderr = os.fdopen(
                real, "w", buffering=1, encoding=ours.encoding, errors=ours.errors, closefd=False
            )
            undo.callback(setattr, sys, "stderr", ours)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        undo.callback(os.dup2, real, 2)
        yield


@contextmanager
def progress_line(what: str, after: float = 0.5) -> Iterator[Callable[[int, int], None]]:
    """On a terminal, a line on stderr that says `what` is being done, if it takes longer than `after` seconds.

    Yields a function of the bytes done and of all, which any thread may call. The line goes when the block ends.
    """
    stream = sys.stderr
    if stream is None or not stream.isatty():
        yield lambda done, of: None
        return
    lock, shown, due, over = Lock(), False, time.monotonic() + after, False

    def show(text: str) -> None:
        nonlocal shown, due
        with lock, suppress(OSError, ValueError):
            if not over and time.monotonic() >= due:
                shown, due = True, time.monotonic() + 0.1
                stream.write(f"\r{printable(text)[:79]:79}")
                stream.flush()

    timer = Timer(after + 0.01, show, [f"{what} …"])
    timer.daemon = True
    timer.start()
    try:
        yield lambda done, of: show(f"{what}: {100 * done // max(of, 1)} % of {bytes_text(of)} checked")
    finally:
        timer.cancel()
        with lock, suppress(OSError, ValueError):
            over = True
            if shown:
                stream.write(f"\r{'':79}\r")
                stream.flush()


def _descriptor(stream: TextIO | None) -> int | None:
    try:
        return None if stream is None else stream.fileno()
    except (OSError, ValueError):  # a stand-in, as test runners set
        return None


@contextmanager
def noted_interrupts() -> Iterator[list[int]]:
    """A list that gains an entry with each Ctrl-C, which still raises `KeyboardInterrupt`.

    A compiled module that is being imported may turn that exception into one of its own; the list does not forget it.
    """
    seen: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    try:
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield seen  # the caller has a handler of its own, or Ctrl-C is ignored
            return
        signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread
        yield seen
        return
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def own_interrupts() -> Iterator[None]:
    """Within the block Ctrl-C raises `KeyboardInterrupt`, and a `noted_interrupts` around it hears nothing of it."""
    try:
        outer = signal.getsignal(signal.SIGINT)
        if outer is signal.SIG_IGN:  # as a shell sets it for what it runs in the background
            yield
            return
        signal.signal(signal.SIGINT, signal.default_int_handler)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, outer)
