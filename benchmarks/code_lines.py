"""`python -m benchmarks.code_lines TREE …`: lines of product code in git trees, and those that name a model family."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from resprune.runtime.families.table import FAMILIES

ROOMS = ("evaluation", "exporter", "graphs", "resprune", "runtime", "serving")
NAMED = re.compile("|".join({re.sub(r"[0-9_].*", "", name) for name in FAMILIES}), re.IGNORECASE)
OWN = "families/"
"""Folders in which a family may be named."""


def main(trees: list[str]) -> None:
    """Print the figures of each tree, room by room and together."""
    for tree in trees:
        print(tree)
        lines = 0
        named: dict[str, int] = {}
        for room in ROOMS:
            listed = subprocess.run(
                ["git", "-C", tree, "ls-files", f"{room}/*.py"], capture_output=True, text=True, check=True
            ).stdout.splitlines()
            texts = {name: Path(tree, name).read_text(encoding="utf-8").splitlines() for name in listed}
            lines += (of_room := sum(map(len, texts.values())))
            named |= {name: sum(map(bool, map(NAMED.search, text))) for name, text in texts.items()}
            print(f"  {room:<12}{len(texts):>4} files {of_room:>7,} lines")
        outside = {name: count for name, count in named.items() if count and OWN not in name}
        print(f"  {'together':<12}{len(named):>4} files {lines:>7,} lines")
        print(
            f"  a family is named outside of {OWN} in {sum(outside.values())} lines of {len(outside)} files:"
        )
        print("".join(f"    {name} {count}\n" for name, count in outside.items()), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
