"""The table of block sizes, on a small product."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import blocks
from resprune.runtime.bundle.precisions import BLOCK_SIZES


def test_every_block_size_and_level_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "LEAST", 1.0)  # not half a second for each of eighteen
    found = blocks.run(tmp_path, (256, 64))
    assert len(found) == len(BLOCK_SIZES) * len(blocks.LEVELS)
    files = [found[f"blocks of {size}, level 4"]["file"] for size in BLOCK_SIZES]
    assert files == sorted(files, reverse=True)
    assert all(one[what] > 0 for one in found.values() for what in ("opening", "step", "prefill"))
    assert "| blocks of 32, level 4 | 0.0 MB |" in blocks.table(found)
    assert not [*tmp_path.iterdir()]
