"""A directory that appears whole or not at all: kills, full disks, and what may be replaced."""

import errno
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from resprune.exporter import transaction
from resprune.exporter.transaction import new_directory, require_space
from resprune.runtime.bundle.manifest import MANIFEST_NAME
from resprune.runtime.errors import ResPruneError


def make(out: Path, text: str, *, force: bool = False) -> None:
    with new_directory(out, force=force) as work:
        (work / "onnx").mkdir()
        (work / "onnx" / "graph").write_text(text)
        (work / MANIFEST_NAME).write_text(text)


def content(out: Path) -> str:
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*"))
    assert files == ["onnx", "onnx/graph", MANIFEST_NAME]
    return (out / MANIFEST_NAME).read_text()


def hidden(parent: Path) -> list[str]:
    return [path.name for path in parent.iterdir() if path.name.startswith(".")]


def test_it_appears_whole(tmp_path):
    make(tmp_path / "deep" / "out", "one")
    assert content(tmp_path / "deep" / "out") == "one"
    assert hidden(tmp_path / "deep") == []


def test_what_exists_is_kept_without_force(tmp_path):
    make(tmp_path / "out", "one")
    with pytest.raises(ResPruneError, match=r"out exists; choose another name, or say --force"):
        make(tmp_path / "out", "two")
    assert content(tmp_path / "out") == "one"


def test_force_replaces_a_bundle(tmp_path):
    make(tmp_path / "out", "one")
    make(tmp_path / "out", "two", force=True)
    assert content(tmp_path / "out") == "two"
    assert hidden(tmp_path) == []


def test_force_replaces_nothing_but_a_bundle(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ResPruneError, match="is not a bundle, so --force will not replace it"):
        make(tmp_path / "out", "two", force=True)
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_an_error_leaves_the_old_bundle(tmp_path):
    def fail() -> None:
        with new_directory(tmp_path / "out", force=True) as work:
            (work / "graph").write_text("half")
            raise RuntimeError("half way")

    make(tmp_path / "out", "one")
    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert content(tmp_path / "out") == "one"
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("below", ["out", "deep/out"])
def test_a_file_in_the_way_is_named(below, tmp_path):
    (tmp_path / "notes").write_text("not a directory")
    with pytest.raises(
        ResPruneError, match=r"nothing can be written at .*out \(.*notes.*: .+\); choose another"
    ) as told:
        make(tmp_path / "notes" / below, "one")
    assert "\n" not in str(told.value)
    assert (tmp_path / "notes").read_text() == "not a directory"


def test_a_place_that_may_not_be_written_to_is_named(tmp_path, monkeypatch):
    def refuse(path: Path, *arguments: object, **keywords: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(
        ResPruneError, match=r"nothing can be written at .*out \(.*: Permission denied\); choose"
    ):
        make(tmp_path / "out", "one")


@contextmanager
def small_files() -> Iterator[None]:
    """No file may grow beyond 10,000 bytes: what a full disk does, without filling one. pytest's own output neither."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    with small_files(), pytest.raises(ResPruneError, match="is full; nothing was left behind"):
        make(tmp_path / "out", "x" * 1_000_000)
    assert list(tmp_path.iterdir()) == []


def test_space_is_checked_beforehand(tmp_path):
    require_space(tmp_path, 1)
    with pytest.raises(ResPruneError, match=r"needs 9,000,000,000,000,000 bytes and .* has [\d,]+ free"):
        require_space(tmp_path, 9 * 10**15)


SCRIPT = """
import os, signal, sys
from pathlib import Path
from resprune.exporter import transaction

out, moment = Path(sys.argv[1]), sys.argv[2]
def die(*arguments, **keywords):
    os.kill(os.getpid(), signal.SIGKILL)

if moment == "before the rename":
    transaction._put_in_place = die
if moment == "between the renames":
    rename = Path.rename
    Path.rename = lambda self, to: rename(self, to) if self == out else die()
if moment == "after the rename":
    transaction._flush = lambda path: die() if path == out.parent else None
with transaction.new_directory(out, force=True) as work:
    (work / "onnx").mkdir()
    (work / "onnx" / "graph").write_text("two")
    if moment == "while writing":
        die()
    (work / "resprune.json").write_text("two")
"""


@pytest.mark.parametrize(
    ("moment", "left", "recovered"),
    [
        ("while writing", "one", "one"),
        ("before the rename", "one", "one"),
        ("between the renames", None, "one"),
        ("after the rename", "two", "two"),
    ],
)
def test_killed_at_any_moment(moment, left, recovered, tmp_path):
    out = tmp_path / "out"
    make(out, "one")
    killed = subprocess.run([sys.executable, "-c", SCRIPT, str(out), moment], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (content(out) if out.exists() else None) == left
    assert hidden(tmp_path)
    with pytest.raises(ResPruneError, match="exists"):  # which looks, and so cleans up, first
        make(out, "three")
    assert content(out) == recovered
    assert hidden(tmp_path) == []
    make(out, "four", force=True)
    assert content(out) == "four"


def test_an_export_that_still_runs_is_left_alone(tmp_path):
    with new_directory(tmp_path / "out", force=False) as work:
        (work / "onnx").mkdir()
        make(tmp_path / "out", "other")
        assert work.exists()
        (tmp_path / "out").rename(tmp_path / "aside")


@pytest.mark.parametrize("step", ["_flush_tree", "require_free"])
def test_one_that_is_about_to_appear_is_left_alone_too(step, tmp_path, monkeypatch):
    """Flushing gigabytes takes long; another export to the same place looks for what was left behind meanwhile."""
    usual, seen = getattr(transaction, step), []

    def look(*arguments, **keywords):
        unfinished = list(tmp_path.glob(".out.resprune-new-*/onnx"))
        if unfinished and not seen:
            seen.append(unfinished)
            transaction._recover(tmp_path / "out")
        usual(*arguments, **keywords)

    monkeypatch.setattr(transaction, step, look)
    make(tmp_path / "out", "one")
    assert seen, "shows nothing"
    assert content(tmp_path / "out") == "one"
    assert hidden(tmp_path) == []


def test_the_old_bundle_is_not_put_back_while_the_new_one_takes_its_place(tmp_path, monkeypatch):
    make(tmp_path / "out", "one")
    rename = Path.rename

    def look(self: Path, to: Path) -> Path:
        if self.name.startswith(".out.resprune-new-"):
            transaction._recover(tmp_path / "out")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", look)
    make(tmp_path / "out", "two", force=True)
    assert content(tmp_path / "out") == "two"
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("force", [False, True])
def test_what_appears_meanwhile_is_left_as_it_is(force, tmp_path):
    """A directory of the user's, whatever was said; and the export that took minutes is not lost either."""

    def export() -> None:
        with new_directory(tmp_path / "out", force=force) as work:
            (work / "onnx").mkdir()
            (work / "onnx" / "graph").write_text("one")
            (work / MANIFEST_NAME).write_text("one")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "thesis.tex").write_text("years of work")

    with pytest.raises(ResPruneError, match=r"out was made by something else .* new bundle is ") as told:
        export()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    assert content(Path(str(told.value).rpartition(" ")[2])) == "one"
    assert hidden(tmp_path) == []


def test_of_two_exports_to_one_place_neither_is_lost(tmp_path):
    def export() -> None:
        with new_directory(tmp_path / "out", force=False) as work:
            (work / "onnx").mkdir()
            (work / "onnx" / "graph").write_text("first")
            (work / MANIFEST_NAME).write_text("first")
            make(tmp_path / "out", "second")

    with pytest.raises(ResPruneError, match="is left as it is; the new bundle is") as told:
        export()
    assert content(tmp_path / "out") == "second"
    assert content(Path(str(told.value).rpartition(" ")[2])) == "first"
