"""The pages of measured tables are those that today's results make, and every table says where it comes from."""

from __future__ import annotations

import re

import pytest

from benchmarks.__main__ import PARTS
from benchmarks.pages import HERE, PAGES, measured, page, read_results, report

RESULTS = read_results([*PARTS])


def test_the_pages_are_current() -> None:
    for path in PAGES:
        assert path.read_text() == page(path.read_text(), RESULTS), "run: python -m benchmarks --pages"
    assert (HERE / "REPORT.md").read_text() == report(RESULTS), "run: python -m benchmarks --pages"


def test_every_result_has_its_place_in_the_page() -> None:
    text = "".join(path.read_text() for path in PAGES)
    assert set(RESULTS) - {"ablation"} <= set(re.findall(r"^<!-- (\w+) -->$", text, flags=re.MULTILINE))
    assert {path.stem for path in (HERE / "results").glob("*.json")} <= set(PARTS)


@pytest.mark.parametrize("part", RESULTS)
def test_a_table_says_when_with_what_and_where(part: str) -> None:
    assert re.match(
        r"Measured 20\d\d-\d\d-\d\d, resprune \d+\.\d+\.\d+; .+, \d+ threads, ", measured(RESULTS[part])
    )


def test_a_table_takes_the_place_of_the_one_before() -> None:
    where = {"processor": "P", "threads": 2, "python": "3.11", "versions": {"onnxruntime": "1"}}
    record = {"measured": "2026-01-01", "version": "9.9.9", "machine": where, "table": "![](a/b.png)"}
    text = "before\n<!-- speed -->\nold\n<!-- end -->\nafter\n<!-- demo -->\nold\n<!-- end -->\n"
    written = page(text, {"speed": record})
    assert "old" not in written
    assert written.startswith(
        "before\n<!-- speed -->\n![](../benchmarks/a/b.png)\n\n*Measured 2026-01-01, resprune 9.9.9; P"
    )
    assert written.endswith("after\n<!-- demo -->\nNot measured with this version.\n<!-- end -->\n")
    assert page(written, {"speed": record}) == written
