"""Writes options.md, every option with its default, from the help texts: python -m docs.options."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

from resprune.runtime.cli import COMMANDS, Parser

PAGE = Path(__file__).with_name("options.md")
HEAD = """# Options and their defaults

From the help texts, by `python -m docs.options`. A flag is off unless it is given.
"""


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parser of each subcommand, by its name."""
    subparsers = Parser(prog="resprune").add_subparsers()
    for command in sorted(entry_points(group=COMMANDS), key=lambda command: command.name):
        command.load()(subparsers)
    return dict(subparsers.choices)


def options(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str, str | None]]:
    """Of each option its form, what it does, and its default as its help says it; None where that says none."""
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        text = (action.help or "") % {**vars(action), "prog": parser.prog}
        said = re.fullmatch(r"(.*?) ?\(default: (.*)\)", text, re.DOTALL)
        about, default = (said[1], said[2]) if said else (text, None)
        value = action.metavar or (
            "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
        )
        if not action.option_strings:
            yield f"{value}", about, default or "required"
        elif action.nargs == 0:
            yield f"{action.option_strings[-1]}", about, "off"
        else:
            yield f"{action.option_strings[-1]} {value}", about, "required" if action.required else default


def page() -> str:
    """The text of options.md."""
    parts = [HEAD]
    for name, parser in commands().items():
        rows = [f"| `{form}` | {about} | {default} |" for form, about, default in options(parser)]
        parts.append(
            f"## resprune {name}\n\n| option | | default |\n|---|---|---|\n" + "\n".join(rows) + "\n"
        )
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
