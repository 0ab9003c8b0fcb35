"""Checks of what callers pass to the Python API: a wrong type is a `ResPruneError` that names the argument."""

import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, TypeVar

from resprune.runtime.errors import ResPruneError, shown

T = TypeVar("T")


def whole(value: object, name: str, least: int, most: int | None = None) -> int:
    """`value` as an int, NumPy's integers included, if it is `least` or more and at most `most`."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except Exception:  # what an object's own __index__ raises
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
    except Exception:  # what an object's own __float__ raises
        converted = math.nan
    if not math.isfinite(converted):
        _refuse(name, "a finite number", value)
    return converted


def text(value: object, name: str) -> str:
    """`value` if it is a string that can be written as UTF-8."""
    if not isinstance(value, str):
        _refuse(name, "a string", value)
    try:
        value.encode()
    except UnicodeEncodeError:  # lone surrogates
        raise ResPruneError(
            f"{name} is not valid UTF-8; check the encoding of the terminal or file"
        ) from None
    return value


def words(value: object, name: str) -> list[str]:
    """The strings of a list, or of one string with commas between them ("cuda,cpu")."""
    if isinstance(value, str):
        value = [word.strip() for word in value.split(",") if word.strip()]
    return [text(word, f"each entry of {name}") for word in items(value, name, "a list of strings")]


def flag(value: object, name: str) -> bool:
    """`value` if it is True or False."""
    if not isinstance(value, bool):
        _refuse(name, "True or False", value)
    return value


def choice(value: object, name: str, choices: Iterable[str]) -> str:
    """`value` if it is one of `choices`."""
    known = list(choices)
    if not isinstance(value, str) or value not in known:
        _refuse(name, f"one of {', '.join(known)}", value)
    return value


def items(value: object, name: str, wanted: str = "a list") -> list[Any]:
    """The entries of any list, tuple or other iterable; a string, a mapping or a number is none."""
    try:
        if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
            _refuse(name, wanted, value)
        return list(value)
    except ResPruneError:
        raise
    except Exception:  # such as NumPy's of an array without axes
        _refuse(name, wanted, value)


def mapping(value: object, name: str) -> Mapping[Any, Any]:
    """`value` if it is a dict or another mapping."""
    if not isinstance(value, Mapping):
        _refuse(name, "a dict", value)
    return value


def instance(value: object, name: str, kind: type[T], wanted: str) -> T:
    """`value` if it is a `kind`, which `wanted` describes."""
    if not isinstance(value, kind):
        _refuse(name, wanted, value)
    return value


def _refuse(name: str, wanted: str, value: object) -> NoReturn:
    kind = type(value).__name__
    form = f" {shown(value)}" if isinstance(value, int | float | str) else ""
    raise ResPruneError(f"{name} should be {wanted}, not {kind}{form}")
