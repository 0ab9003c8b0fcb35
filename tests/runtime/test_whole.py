"""A file that is there whole or not at all."""

import errno
from pathlib import Path
from typing import Any

import pytest

from resprune.runtime.bundle.whole import write_whole


def test_it_takes_the_place_of_what_was_there(tmp_path: Path) -> None:
    for content in (b"one", b"\xff\r\n"):
        write_whole(tmp_path / "file.json", content)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file.json": content}


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_whole(tmp_path / "file.json", b"one")
    monkeypatch.setattr("os.fsync", full)
    for name in ("file.json", "other"):
        with pytest.raises(OSError, match="No space left"):
            write_whole(tmp_path / name, b"two")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file.json": b"one"}
