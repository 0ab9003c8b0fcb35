"""JSON from anywhere: without NaN, infinite or overflowing numbers, and not nested without end."""

import json
import math
from typing import Any

from resprune.runtime.errors import shown


def strict_json(text: str | bytes, max_depth: int, *, unique: bool = False) -> Any:
    """The value of a JSON text, which as bytes is UTF-8, of at most `max_depth` objects and lists in each other.

    With `unique` no key may stand twice in an object; else the last one counts, as `json` has it.

    Raises:
        ValueError: for anything else, in words for a parenthesis.

    """
    pairs = _unique if unique else None
    text = text.decode("utf-8") if isinstance(text, bytes) else text
    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_float=_finite, parse_constant=_finite)
        deep = _depth(value, max_depth) > max_depth
    except RecursionError:
        deep = True
    if deep:
        raise ValueError("it is nested too deeply")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"the key {shown(key)} stands twice")
        table[key] = value
    return table


def _finite(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise ValueError(f"{shown(literal)} is no finite number")
    return value


def _depth(value: object, most: int) -> int:
    """How many objects and lists stand in each other, counted up to one more than `most`; without recursion."""
    level, depth = [value], 0
    while level and depth <= most:
        nested = [entry for entry in level if isinstance(entry, dict | list)]
        depth += bool(nested)
        level = [
            inner for entry in nested for inner in (entry.values() if isinstance(entry, dict) else entry)
        ]
    return depth
