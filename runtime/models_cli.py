"""`resprune models`: the families, as the table has them."""

import argparse
import json
import textwrap
from typing import Any

from resprune.runtime.families.table import FAMILIES, Family

VERIFIED = (
    "Verified with random weights, no published checkpoint being at hand: pixels, prompt ids, picks and 40 greedy "
    "tokens are those of Hugging Face's transformers, in fp32 on a CPU, by the tests and benchmarks that are named."
)


def register_models(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `resprune models`."""
    parser = subparsers.add_parser(
        "models",
        help="list the model families, their aliases and their defaults",
        description="List the model families, their aliases, their defaults, and what verifies each.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the text")
    parser.set_defaults(run=_models)


def described(family: Family) -> dict[str, Any]:
    """A row as JSON takes it."""
    defaults = family.defaults
    return {
        "family": family.name,
        "title": family.title,
        "aliases": dict(family.aliases),
        "positions": list(defaults.positions),
        "alpha": defaults.alpha,
        "attention": defaults.attention,
        "why": dict(defaults.why),
        "any_size": family.any_size,
        "servers": list(family.servers),
        "verified_by": list(family.verified),
    }


def _models(arguments: argparse.Namespace) -> int:
    if arguments.json:
        rows = [described(family) for family in FAMILIES.values()]
        print(json.dumps({"verified": VERIFIED, "families": rows}))
        return 0
    for family in FAMILIES.values():
        print(f"{family.title} ({family.name})")
        for what, text in _lines(family):
            print(textwrap.fill(text, 80, initial_indent=f"  {what:<10}", subsequent_indent=" " * 12))
    print()
    print(textwrap.fill(VERIFIED, 80))
    return 0


def _lines(family: Family) -> list[tuple[str, str]]:
    defaults = family.defaults
    first, *others = defaults.positions
    legal = f" (or {' or '.join(others)})" if others else " alone"
    values = {
        "positions": f"{first}{legal}",
        "alpha": f"{defaults.alpha:g}",
        "attention": defaults.attention,
    }
    aliases = [f"{alias:<22}{hub_id}" for alias, hub_id in family.aliases.items()]
    aliases = aliases or ["none; give a hub id or a directory"]
    return [
        *zip(["aliases", *[""] * len(aliases)], aliases, strict=False),
        *((name, f"{value}: {defaults.why[name]}") for name, value in values.items()),
        ("servers", ", ".join(family.servers) or "none"),
        ("verified", ", ".join(family.verified)),
    ]
