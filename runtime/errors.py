"""The errors that a user meets, and what they are made of."""

import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class ResPruneError(Exception):
    """An error that the user can correct. Its text is one line that says how; the CLI exits with status 2."""


class UnavailableError(ResPruneError):
    """What another machine failed to do; asking again may help."""


class FailedError(ResPruneError):
    """What the model or this machine failed to do; the question is not at fault."""


def one_line(error: object) -> str:
    """What an error says, for a sentence: one line, 300 characters at most; its type's name where it says nothing."""
    text = " ".join(printable(str(error)).split())
    if not text and isinstance(error, BaseException):
        text = type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def shown(value: object) -> str:
    """A short printable form of any value, for a message."""
    try:
        form = ascii(value)
    except (ValueError, RecursionError):  # Python prints no integer of more than 4,300 digits
        return f"a huge {type(value).__name__}"
    return form if len(form) <= 80 else f"{form[:77]}..."


def printable(text: str) -> str:
    """`text` without control characters other than line breaks and tabs: others' text must not steer a terminal.

    Nor turn the order of what is read: Unicode's embeddings, overrides and isolates of direction go as well.
    """
    return _CONTROL.sub("", text)


@contextmanager
def tokenizer_panics(what: str) -> Iterator[None]:
    """Turn a panic of the tokenizers library into a `ResPruneError` that begins with `what`.

    A panic of Rust is a `pyo3_runtime.PanicException`, which derives from `BaseException` and cannot be imported.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ResPruneError(
            f"{what} (the tokenizers library failed: {one_line(error)}); export the bundle again"
        ) from None


@contextmanager
def permission_faults() -> Iterator[None]:
    """Turn a `PermissionError` into a `ResPruneError` that names the file."""
    try:
        yield
    except PermissionError as error:
        if not error.filename:
            raise
        raise ResPruneError(
            f"{error.filename} cannot be used ({error.strerror}); give this user the right to"
        ) from error


def require_python(what: str, least: tuple[int, int]) -> None:
    """`ResPruneError` for an older Python than `what`, a command for workstations, is written for."""
    if sys.version_info < least:
        raise ResPruneError(f"{what} needs Python {least[0]}.{least[1]} or newer; answering needs 3.10")


def require_packages(what: str, packages: Iterable[str], way: str) -> None:
    """`ResPruneError`, "`what` needs …; `way`", if one of `packages` is not installed. Imports none of them."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ResPruneError(f"{what} needs {', '.join(missing)}; {way}")
