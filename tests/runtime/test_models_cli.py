"""`resprune models` says what the table of families says."""

import json

import pytest

from resprune.runtime.cli import main
from resprune.runtime.families.table import FAMILIES, aliases


def test_every_row_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    text = capsys.readouterr().out
    parts = text.split("\n\n")[0].split("\n")
    titles = [line for line in parts if not line.startswith(" ")]
    assert titles == [f"{row.title} ({row.name})" for row in FAMILIES.values()]
    for alias, hub_id in aliases().items():
        assert any(alias in line.split() and hub_id in line.split() for line in parts)
    assert max(map(len, text.splitlines())) <= 80
    text = " ".join(text.split())
    assert "positions original alone: Under M-RoPE" in text
    assert "alpha 0.5: Others found" in text
    assert "with random weights" in text
    for row in FAMILIES.values():
        assert ", ".join(row.verified) in text
        assert all(reason in text for reason in row.defaults.why.values())


def test_json_has_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["family"] for row in told["families"]] == list(FAMILIES)
    assert {
        alias: hub_id for row in told["families"] for alias, hub_id in row["aliases"].items()
    } == aliases()
    for row in told["families"]:
        assert row["alpha"] == FAMILIES[row["family"]].defaults.alpha
        assert set(row["why"]) == {"positions", "alpha", "attention"}
    assert "random weights" in told["verified"]
