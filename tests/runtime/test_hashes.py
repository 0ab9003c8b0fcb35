"""Hashes: large files while something else goes on, and not again while they are unchanged."""

import hashlib
import io
import os
import sys
from pathlib import Path

import pytest

from resprune.runtime.bundle import hashes
from resprune.runtime.bundle.hashes import hashed_meanwhile
from resprune.runtime.bundle.manifest import FileSpec
from resprune.runtime.console import progress_line
from resprune.runtime.errors import ResPruneError

CONTENT = {"small": b"abc", "large": bytes(range(256)) * 40}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "LARGE_BYTES", 1000)
    monkeypatch.setattr(hashes, "HASH_BLOCK", 1024)
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "bundle").mkdir()
    for name, content in CONTENT.items():
        path = tmp_path / "bundle" / name
        path.write_bytes(content)
        os.utime(path, (1e9, 1e9))
    return tmp_path / "bundle"


FILES = {
    name: FileSpec(len(content), hashlib.sha256(content).hexdigest()) for name, content in CONTENT.items()
}


def hashed(root: Path, **options: bool) -> int:
    """Bytes that were hashed."""
    counts = [0]
    with hashed_meanwhile(root, FILES, progress=lambda done, of: counts.append(done), **options):
        pass
    return max(counts)


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"!")


def test_a_small_file_is_checked_before_the_block(root: Path) -> None:
    spoil(root / "small")
    with pytest.raises(ResPruneError, match="small was altered"), hashed_meanwhile(root, FILES):
        pytest.fail("the block ran")


def test_a_large_file_is_checked_by_its_end_and_explains_what_failed_in_it(root: Path) -> None:
    spoil(root / "large")
    ran = []
    with pytest.raises(ResPruneError, match="large was altered"), hashed_meanwhile(root, FILES):
        ran.append(True)
    assert ran
    with pytest.raises(ResPruneError, match="large was altered"), hashed_meanwhile(root, FILES):
        raise ValueError("no graph")


def test_what_fails_in_the_block_for_another_reason_is_told(root: Path) -> None:
    with pytest.raises(ValueError, match="no graph"), hashed_meanwhile(root, FILES):
        raise ValueError("no graph")


def test_files_are_hashed_again_only_once_they_changed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "RECENT_NS", -1_000_000_000)  # they were made just now
    every = sum(map(len, CONTENT.values()))
    assert hashed(root) == every
    assert hashed(root) == 0
    assert hashed(root, remember=False) == every
    spoil(root / "large")
    os.utime(root / "large", (1e9, 1e9))  # size and time of change as before
    with pytest.raises(ResPruneError, match="large was altered"):
        hashed(root)
    (root / "large").write_bytes(CONTENT["large"])
    assert hashed(root) == len(CONTENT["large"])


def test_a_file_that_changed_just_now_is_not_remembered(root: Path) -> None:
    every = sum(map(len, CONTENT.values()))
    assert hashed(root) == hashed(root) == every


@pytest.mark.parametrize("content", [b"", b"[]", b'{"small": 3, "large": [1, 2]}', b"\xff"])
def test_a_cache_that_is_damaged_knows_nothing(content: bytes, root: Path, cache: Path) -> None:
    assert hashed(root)
    (file,) = (cache / "resprune" / "checked").iterdir()
    file.write_bytes(content)
    assert hashed(root) == sum(map(len, CONTENT.values()))


def test_a_cache_that_cannot_be_written_is_no_error(root: Path, cache: Path) -> None:
    cache.write_text("no folder")
    assert hashed(root) == hashed(root) == sum(map(len, CONTENT.values()))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_on_a_terminal_shows_how_far_it_is_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_line("opening bundle", after=0) as progress:
        progress(30_000_000, 60_000_000)
    shown = stream.getvalue().split("\r")
    assert shown[1].rstrip() in ("opening bundle: 50 % of 60.0 MB checked", "opening bundle …")
    assert all(len(line) <= 79 for line in shown)
    assert [line.strip() for line in shown[-2:]] == ["", ""]


def test_elsewhere_than_on_a_terminal_it_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_line("opening bundle", after=0) as progress:
        progress(1, 2)
    assert stream.getvalue() == ""
