"""Every option says its default, and docs/options.md is what the help texts say."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs.options import PAGE, commands, options, page


@pytest.mark.parametrize("name", commands())
def test_help_says_every_default_in_80_columns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    parser = commands()[name]
    assert parser.description
    for form, about, default in options(parser):
        assert about, f"{form} says nothing"
        assert default, f"{form} says no default"
    assert max(map(len, parser.format_help().splitlines())) <= 80


def test_the_page_is_what_the_help_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m docs.options writes it"


def test_no_number_is_typed_into_a_help_text() -> None:
    """It stands once, where it is used; a help text is made of it."""
    root = Path(__file__).parent.parent
    files = [
        path
        for room in ("runtime", "exporter", "evaluation", "serving")
        for path in (root / room).rglob("*.py")
    ]
    typed = [
        f"{path.relative_to(root)}:{node.lineno} {node.value}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.search(r"\(default: [\d., ]+\)", node.value)
    ]
    assert len(files) > 100
    assert typed == []


def test_export_lists_the_aliases() -> None:
    words = [sys.executable, "-m", "resprune", "export", "--help"]
    done = subprocess.run(
        words, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "80"}
    )
    for alias in ("demo", "llava15", "qwen25vl-7b", "smolvlm2-256m"):
        assert alias in done.stdout


@pytest.mark.parametrize(
    ("word", "asked"), [("16", {"k": 16}), ("11%", {"share": 0.11}), ("all", {"share": 1.0})]
)
def test_export_takes_a_number_a_share_or_all(word: str, asked: dict[str, float]) -> None:
    assert commands()["export"].parse_args(["demo", "out", "-k", word]).tokens == asked
