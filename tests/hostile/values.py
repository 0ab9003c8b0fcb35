"""Values and bytes that nobody expects, and places to put them."""

import json
from random import Random
from typing import Any

NUMBERS = (
    *(
        0,
        -1,
        1,
        2,
        3,
        7,
        255,
        1 << 16,
        1 << 20,
        (1 << 31) - 1,
        1 << 31,
        1 << 32,
        1 << 62,
        1 << 63,
        10**30,
        10**400,
    ),
    *(0.5, -0.0, 1e-300, 1e30, 1e300, float("inf"), float("-inf"), float("nan")),
)
TEXTS = (
    *(
        "",
        " ",
        "a",
        "\n",
        "\0",
        "\x1b[31mred\x1b[0m",
        "\u202e",
        "\ud800",
        "é" * 300,
        "x" * 70_000,
        "../../etc/passwd",
    ),
    *(
        "/etc/passwd",
        "NaN",
        "1e999",
        "-1",
        "true",
        "<image>",
        "</s>",
        "{{ 7 * 7 }}",
        "%s%n",
        "日本語 🎉",
        "\ufdd0",
        "\ufffe",
    ),
)


def value(random: Random, depth: int = 0) -> Any:
    """Any JSON value, also one that JSON has no way to write."""
    kind = random.randrange(9 if depth < 3 else 6)
    if kind < 2:
        return random.choice(NUMBERS)
    if kind < 4:
        return random.choice(TEXTS)
    if kind == 4:
        return random.choice([None, True, False])
    if kind == 5:
        return nested(random.choice([2, 40, 600]))
    if kind < 8:
        return [value(random, depth + 1) for _ in range(random.randrange(4))]
    return {random.choice(TEXTS[:8]): value(random, depth + 1) for _ in range(random.randrange(3))}


def nested(depth: int) -> Any:
    """Lists in each other."""
    made: list[Any] = []
    for _ in range(depth):
        made = [made]
    return made


def with_one_changed(random: Random, tree: Any) -> tuple[Any, str]:
    """A JSON value with one of its parts changed, left out, or added; and where."""
    tree = json.loads(json.dumps(tree))
    places = list(_places(tree))
    if not places:
        return value(random), "."
    holder, key, path = random.choice(places)
    action = random.randrange(8)
    if action == 0:
        del holder[key]
    elif action == 1 and isinstance(holder, dict):
        holder[random.choice(TEXTS)] = value(random)
    else:
        holder[key] = value(random)
    return tree, path


def _places(tree: Any, path: str = "") -> Any:
    steps = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, inner in list(steps):
        yield tree, key, f"{path}.{key}"
        yield from _places(inner, f"{path}.{key}")


def written(tree: Any) -> bytes:
    """JSON as a hostile program writes it: NaN and lone surrogates as they come."""
    return json.dumps(tree).encode()


def damaged(random: Random, content: bytes) -> bytes:
    """A file cut short, with bytes changed, a part repeated, or something before or behind it; never as it was."""
    while (changed := _damaged(random, content)) == content:
        pass
    return changed


def _damaged(random: Random, content: bytes) -> bytes:
    changed = bytearray(content)
    action = random.randrange(6)
    if action == 0:
        return bytes(changed[: random.randrange(len(changed) + 1)])
    if action == 1:
        start, stop = sorted(random.randrange(len(changed) + 1) for _ in range(2))
        return bytes(changed[:stop] + changed[start:])
    if action == 2:
        return random.choice([b"\xef\xbb\xbf", b"\0" * 9, b"\n"]) + bytes(changed)
    if action == 3:
        return bytes(changed) + random.randbytes(random.randrange(1, 200))
    for _ in range(random.choice([1, 2, 8, 64])):
        if changed:
            changed[random.randrange(len(changed))] = random.choice(
                [0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)]
            )
    return bytes(changed)
