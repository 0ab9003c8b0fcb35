"""Fields of a manifest, each checked as it is read: every fault is one `ResPruneError` that names the field.

`where` stands before a field's name in messages, such as "graphs.vision_select.".
"""

from collections.abc import Iterable
from typing import Any, TypeVar, cast

from resprune.runtime.bundle.strict_json import strict_json
from resprune.runtime.errors import ResPruneError, shown

FILE = "resprune.json"
MAX_DEPTH = 32
"""Of objects and lists in each other."""

T = TypeVar("T")


def parse(text: str | bytes) -> dict[str, Any]:
    """The object that the file holds."""
    try:
        value = strict_json(text, MAX_DEPTH, unique=True)
    except ValueError as error:
        raise ResPruneError(f"{FILE} is not valid JSON ({error}); export the bundle again") from None
    return expect("its content", value, dict)


def choice(table: dict[str, Any], key: str, choices: Iterable[str], where: str = "") -> str:
    """A string that is one of `choices`."""
    value = member(table, key, str, where)
    if value not in choices:
        raise fault(f"{where}{key}", f"one of {', '.join(choices)}", value)
    return value


def whole(table: dict[str, Any], key: str, where: str = "", *, least: int, most: int = (1 << 63) - 1) -> int:
    """A whole number from `least` to `most`."""
    value = member(table, key, int, where)
    if not least <= value <= most:
        limit = "" if most >= 1 << 62 else f" to {most}"
        raise fault(f"{where}{key}", f"a whole number from {least}{limit}", value)
    return value


def member(table: dict[str, Any], key: str, kind: type[T], where: str = "") -> T:
    """`table[key]` if it is there and of `kind`."""
    if key not in table:
        raise ResPruneError(f"{FILE} has no {where}{key}; export the bundle again")
    return expect(f"{where}{key}", table[key], kind)


def expect(what: str, value: object, kind: type[T]) -> T:
    """`value` if it is of `kind`; a whole number serves as a float, a bool never serves as a number."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63:
        return cast("T", float(value))
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        words = {dict: "an object", list: "a list", str: "a string", int: "a whole number", float: "a number"}
        raise fault(what, words[kind], value)
    return value


def fault(what: str, wanted: str, got: object) -> ResPruneError:
    """The error that `what` is not what was `wanted`."""
    return ResPruneError(
        f"{FILE}: {_clip(what)} should be {wanted}, not {shown(got)}; export the bundle again"
    )


def _clip(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
