"""What a container leaves of its host's memory."""

from pathlib import Path

import pytest

from resprune.exporter import memory
from resprune.exporter.memory import available_memory


def test_a_container_has_less_memory_than_its_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert available_memory() > 1 << 20
    monkeypatch.setattr(
        memory, "CONTAINERS", [(tmp_path, "limit", "used"), (tmp_path / "none", "limit", "used")]
    )
    (tmp_path / "used").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 1000000\ninactive_file 2000000\n")
    (tmp_path / "limit").write_text("max\n")
    assert available_memory() > 1 << 20
    (tmp_path / "limit").write_text("4000000\n")
    assert available_memory() == 3000000
