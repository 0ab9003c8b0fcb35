"""The one error type that a user can cause."""

import importlib.util
from collections.abc import Iterable


class ResPruneError(Exception):
    """Something the user can put right; its text is one sentence that says how. The CLI exits with 2."""


def require_packages(what: str, packages: Iterable[str], way: str) -> None:
    """`ResPruneError`, "`what` needs …; `way`", if one of `packages` is not installed. Imports none of them."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ResPruneError(f"{what} needs {', '.join(missing)}; {way}")
