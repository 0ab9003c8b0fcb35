"""The one error type that a user can cause."""

import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class ResPruneError(Exception):
    """Something the user can put right; its text is one sentence that says how. The CLI exits with 2."""


def one_line(error: object) -> str:
    """What an error says, for a sentence: one line, 300 characters at most; its type's name where it says nothing."""
    text = " ".join(str(error).split())
    if not text and isinstance(error, BaseException):
        text = type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


@contextmanager
def permission_faults() -> Iterator[None]:
    """Turn a file that this user may not use into one sentence."""
    try:
        yield
    except PermissionError as error:
        if not error.filename:
            raise
        raise ResPruneError(
            f"{error.filename} cannot be used ({error.strerror}); give this user the right to"
        ) from error


def require_packages(what: str, packages: Iterable[str], way: str) -> None:
    """`ResPruneError`, "`what` needs …; `way`", if one of `packages` is not installed. Imports none of them."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ResPruneError(f"{what} needs {', '.join(missing)}; {way}")
