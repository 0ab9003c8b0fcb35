"""Checks of what callers pass to the Python API: a wrong type is a `ResPruneError` that names the argument."""

import math
import operator
from collections.abc import Iterable
from typing import NoReturn

from resprune.runtime.errors import ResPruneError, shown


def whole(value: object, name: str, least: int, most: int | None = None) -> int:
    """`value` as an int, NumPy's integers included, if it is `least` or more and at most `most`."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        _refuse(name, "a whole number", value)
    if isinstance(value, bool):
        _refuse(name, "a whole number", value)
    if number < least or (most is not None and number > most):
        limits = f"{least} or more" if most is None else f"{least} to {most}"
        raise ResPruneError(f"{name} should be {limits}, not {shown(number)}")
    return number


def number(value: object, name: str) -> float:
    """`value` as a finite float."""
    try:
        converted = math.nan if isinstance(value, bool | str | bytes) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        converted = math.nan
    if not math.isfinite(converted):
        _refuse(name, "a finite number", value)
    return converted


def text(value: object, name: str) -> str:
    """`value` if it is a string that can be written as UTF-8."""
    if not isinstance(value, str):
        _refuse(name, "a string", value)
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ResPruneError(f"{name} is not valid UTF-8; check the encoding of the terminal or file")
    return value


def words(value: object, name: str) -> list[str]:
    """The strings of a list, or of one string with commas between them ("cuda,cpu")."""
    if isinstance(value, str):
        value = [word.strip() for word in value.split(",") if word.strip()]
    if isinstance(value, bytes | dict) or not isinstance(value, Iterable):
        _refuse(name, "a list of strings", value)
    return [text(word, f"each entry of {name}") for word in value]


def _refuse(name: str, wanted: str, value: object) -> NoReturn:
    kind = type(value).__name__
    form = f" {shown(value)}" if isinstance(value, int | float | str) else ""
    raise ResPruneError(f"{name} should be {wanted}, not {kind}{form}")
