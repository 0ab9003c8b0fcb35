"""The pages of measured tables, written from benchmarks/results/: REPORT.md whole, those of docs/ between marks.

A table's line says when it was measured, with which resprune, and on what machine. In docs/ the text
around the tables is written by hand, and `<!-- PART -->` … `<!-- end -->` encloses the table of a part.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGES = [
    HERE.parent / "docs" / name for name in ("benchmarks.md", "llama-cpp.md", "method.md", "precision.md")
]
BUDGETS = ("8", "16", "32", "64")
Record = Mapping[str, Any]


def read_results(parts: Sequence[str]) -> dict[str, Record]:
    """Of the parts that have been measured, by name, in the order of `parts`."""
    files = {part: HERE / "results" / f"{part}.json" for part in parts}
    results = {part: json.loads(file.read_text()) for part, file in files.items() if file.exists()}
    return {part: record | {"table": _written_out(record["table"])} for part, record in results.items()}


def _written_out(table: str) -> str:
    """A table in which 1.102e+04 is 11,020."""
    return re.sub(r"\b\d\.\d+e\+\d+", lambda match: f"{float(match[0]):,.0f}", table)


def measured(record: Record) -> str:
    """When, with what and where a table was measured."""
    where = record["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    return (
        f"Measured {record['measured']}, resprune {record['version']}; {where['processor']}, "
        f"{where['threads']} threads, Python {where['python']}, {versions}."
    )


def report(results: Mapping[str, Record]) -> str:
    """Every table in full."""
    head = "# Measured\n\nWritten by `make bench`; medians, with quartiles, of calls that take turns.\n"
    sections = [f"## {one['title']}\n\n{one['table']}\n\n{measured(one)}\n" for one in results.values()]
    return "\n".join([head, *sections])


def page(text: str, results: Mapping[str, Record]) -> str:
    """A page of docs/ with the tables of today's results in the place of those that it has."""

    def filled(match: re.Match[str]) -> str:
        part = match[1]
        if part not in results:
            return f"<!-- {part} -->\nNot measured with this version.\n<!-- end -->"
        record = results[part]
        table = _accuracy(record) if part == "accuracy" else record["table"]
        table = re.sub(r"\]\(([\w/-]+\.png)\)", r"](../benchmarks/\1)", table)
        return f"<!-- {part} -->\n{table}\n\n*{measured(record)}*\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", filled, text, flags=re.DOTALL)


def write(parts: Sequence[str]) -> None:
    """Write the pages."""
    results = read_results(parts)
    (HERE / "REPORT.md").write_text(report(results))
    for path in PAGES:
        path.write_text(page(path.read_text(), results))


def _accuracy(record: Record) -> str:
    """Exact match alone; the full tables, by type of question and with tests, are twenty times as long."""
    sections = ["![Exact match by tokens kept, one line a selector](../benchmarks/accuracy-all.png)"]
    for title, sheets in record["figures"]["scores"].items():
        columns = [(sheet["data"], k) for sheet in sheets for k in BUDGETS]
        exact = {
            (score["selector"], sheet["data"], score["k"]): 100 * score["exact_match"]
            for sheet in sheets
            for score in sheet["scores"]
        }
        rows = [
            "| | " + " | ".join(f"{data}, K {k}" for data, k in columns) + " |",
            "|---" * (len(columns) + 1) + "|",
        ]
        for selector in dict.fromkeys(selector for selector, _, _ in exact):
            cells = [exact[selector, data, k if selector else "all"] for data, k in columns]
            rows.append(
                f"| {selector or 'all tokens'} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |"
            )
        sections.append(f"With {title}, exact match in percent:\n\n" + "\n".join(rows))
    return "\n\n".join(sections)
