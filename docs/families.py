"""Writes families.md, the families with their defaults and the reasons, from the table: python -m docs.families."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from resprune.runtime.bundle.manifest import ATTENTION
from resprune.runtime.families.table import FAMILIES, Defaults

PAGE = Path(__file__).with_name("families.md")
HEAD = """# Families and their defaults

From the table that the code reads, by `python -m docs.families`; `resprune models` prints the same. `--positions`,
`--alpha` and `--attention` of `resprune export` choose others. [Models](models.md) says what is verified.
"""


def settings(defaults: Defaults) -> Iterator[tuple[str, str, str, str]]:
    """Of each setting its option, its default, what else may be chosen, and why."""
    first, *others = defaults.positions
    yield "positions", first, ", ".join(others) or "nothing", defaults.why["positions"]
    yield "alpha", f"{defaults.alpha:g}", "any from 0", defaults.why["alpha"]
    others = [each for each in ATTENTION if each != defaults.attention]
    yield "attention", defaults.attention, ", ".join(others), defaults.why["attention"]


def page() -> str:
    """The text of families.md."""
    parts = [HEAD]
    for defaults in {id(row.defaults): row.defaults for row in FAMILIES.values()}.values():
        titles = ", ".join(row.title for row in FAMILIES.values() if row.defaults is defaults)
        rows = [
            f"| `--{name}` | {value} | {others} | {why} |" for name, value, others, why in settings(defaults)
        ]
        parts.append(
            f"## {titles}\n\n| option | default | or | why |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
        )
    rows = []
    for row in FAMILIES.values():
        aliases = ", ".join(f"`{alias}`" for alias in row.aliases) or "none"
        rows.append(f"| {row.title} | `{row.name}` | {aliases} | {', '.join(row.servers) or 'none'} |")
    parts.append(
        "## Names\n\n| family | `model_type` | aliases | servers |\n|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n"
    )
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
