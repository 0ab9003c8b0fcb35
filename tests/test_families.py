"""Everything that depends on a model family stands in its modules and its row, and nowhere else in the product."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.families import PAGE, page
from resprune.runtime.backends.formats import ENGINE, PYTORCH, SERVER_FORMATS
from resprune.runtime.bundle.manifest import ATTENTION, POSITIONS
from resprune.runtime.families.table import FAMILIES, aliases

ROOT = Path(__file__).parent.parent
ROOMS = ("exporter", "runtime", "graphs", "evaluation", "serving")
BRANDS = (
    "llava",
    "qwen",
    "internvl",
    "smolvlm",
    "idefics",
    "gemma",
    "granite",
    "fastvlm",
    "fast_vlm",
    "minicpm",
    "lfm2",
)
NAMED = re.compile("|".join(BRANDS), re.IGNORECASE)
CODE = (".py", ".html", ".js", ".css", ".svg")


def product_files() -> Iterator[Path]:
    """The files of the product, its page as well, but for the families' folders."""
    yield from sorted((ROOT / "resprune").glob("*.py"))
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*")):
            if path.suffix in CODE and "families" not in path.parts:
                yield path


def families_named(text: str) -> list[str]:
    """The lines that name a family."""
    return [line.strip() for line in text.splitlines() if NAMED.search(line)]


def test_no_other_code_names_a_family() -> None:
    paths = {path.relative_to(ROOT).as_posix(): path for path in product_files()}
    assert len(paths) > 150
    assert {
        "resprune/names.py",
        "serving/page/index.html",
        "serving/page/script.js",
    } <= paths.keys()
    named = {name: families_named(path.read_text(encoding="utf-8")) for name, path in paths.items()}
    assert {name: lines for name, lines in named.items() if lines} == {}


def test_the_search_finds_what_it_is_for() -> None:
    assert families_named('x = 1\nif kind.startswith("qwen"):\n# as LLaVA has it') == [
        'if kind.startswith("qwen"):',
        "# as LLaVA has it",
    ]
    for name in FAMILIES:
        assert families_named(f'family == "{name}"'), f"add {name} to BRANDS"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_says_what_the_rest_can_read(name: str) -> None:
    row = FAMILIES[name]
    assert row.name == name
    for room in ("exporter", "runtime"):
        assert importlib.util.find_spec(f"resprune.{room}.families.{row.module}") is not None
    defaults = row.defaults
    assert set(defaults.positions) <= set(POSITIONS)
    assert defaults.positions
    assert defaults.attention in ATTENTION
    assert defaults.alpha >= 0
    assert list(defaults.why) == ["positions", "alpha", "attention"]
    for reason in defaults.why.values():
        assert reason.endswith("."), reason
        assert ". " not in reason, "one sentence"
    assert set(row.servers) <= {*SERVER_FORMATS, PYTORCH, ENGINE}
    assert any(path.startswith("tests/exporter/test_parity_") for path in row.verified)
    for path in row.verified:
        text = (ROOT / path).read_text(encoding="utf-8")
        assert row.title in text, f"{path} does not say that it is about {row.title}"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_page_on_models_has_a_row(name: str) -> None:
    """The first cell of a row of the first table names it."""
    row, text = FAMILIES[name], (ROOT / "docs/models.md").read_text(encoding="utf-8")
    assert re.search(rf"^\|[^|]*{re.escape(row.title)}[^|]*\|", text, re.MULTILINE)


def test_the_page_on_families_is_what_the_table_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m docs.families writes it"


def test_an_alias_stands_for_one_model() -> None:
    assert len(aliases()) == sum(len(row.aliases) for row in FAMILIES.values())
    assert all(hub_id.count("/") == 1 for hub_id in aliases().values())
