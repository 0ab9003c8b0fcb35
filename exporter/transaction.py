"""A directory that appears whole or not at all.

It is written beside its place under a hidden name, flushed, and renamed as the last step. What a killed export left
behind is recognised by its name and by a lock that no living process holds, and removed by the next export.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from filelock import lock_descriptor

from resprune.runtime.bundle.manifest import MANIFEST_NAME
from resprune.runtime.errors import ResPruneError, permission_faults

NEW = ".resprune-new-"
OLD = ".resprune-old-"
LOCK = ".lock"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def new_directory(out: Path, *, force: bool) -> Iterator[Path]:
    """Yields an empty directory that becomes `out` when the block ends without an exception.

    With `force` an existing bundle at `out` stays in place until then. Raises `ResPruneError` if `out` exists, is
    something other than a bundle, cannot be made, or the disk is full; and if `out` was taken meanwhile by
    what may not be replaced: that is left alone, and what the block made is put beside it.
    """
    out = out.parent.resolve() / out.name  # the place itself, should it be a link
    work = out.parent / f".{out.name}{NEW}{uuid.uuid4().hex[:12]}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _recover(out)
        require_free(out, force=force)
        work.mkdir()
    except OSError as error:
        raise _refusal(out, error) from error
    try:
        with permission_faults(), (work / LOCK).open("w") as held:
            lock(held)
            yield work
            _flush_tree(work)  # of a large bundle this takes long, under the lock
            _put_in_place(work, out, force=force)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise _refusal(out, error) from error
        raise  # of something else that the block read or wrote
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _refusal(out: Path, error: OSError) -> ResPruneError:
    if error.errno in NO_SPACE:
        return ResPruneError(
            f"the disk that holds {out.parent} is full; nothing was left behind, make room and export again"
        )
    return ResPruneError(
        f"nothing can be written at {out} ({error.filename}: {error.strerror}); choose another place, or see that its "
        "directory can be written to"
    )


def require_space(directory: Path, needed: int) -> None:
    """`ResPruneError`, naming the bytes, if the disk of `directory` cannot take `needed` more."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ResPruneError(
            f"the export needs {needed:,} bytes and the disk that holds {directory} has {free:,} free; make room there"
        )


def require_free(out: Path, *, force: bool) -> None:
    """`ResPruneError` if there is something at `out` that an export may not replace."""
    if not os.path.lexists(out):
        return
    if not force:
        raise ResPruneError(f"{out} exists; choose another name, or say --force to replace it")
    if out.is_symlink() or not (out / MANIFEST_NAME).is_file():
        raise ResPruneError(
            f"{out} exists and is not a bundle, so --force will not replace it; choose another name"
        )


def _put_in_place(work: Path, out: Path, *, force: bool) -> None:
    place = out
    try:
        require_free(out, force=force)  # again, for an export takes minutes
    except ResPruneError:
        place = out.parent / f"{out.name}-{uuid.uuid4().hex[:12]}"
    old = out.parent / f".{out.name}{OLD}{uuid.uuid4().hex[:12]}"
    if force and place.exists():
        place.rename(old)  # killed here, the next export to this place puts it back
    work.rename(place)
    (place / LOCK).unlink()  # not before: whoever finds `work` without a lock removes it
    _flush(out.parent)
    shutil.rmtree(old, ignore_errors=True)
    if place != out:
        raise ResPruneError(
            f"{out} was made by something else during the export and is left as it is; the new bundle is {place}"
        )


def _recover(out: Path) -> None:
    """Undo what an interrupted export to `out` left: put the old bundle back, remove unfinished new ones.

    Not while another one to `out` runs, whose work all of it may be.
    """
    unfinished = list(out.parent.glob(f".{_literal(out.name)}{NEW}*"))
    if any(_alive(work) for work in unfinished):
        return
    for old in sorted(out.parent.glob(f".{_literal(out.name)}{OLD}*")):
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(out)
    for work in unfinished:
        shutil.rmtree(work, ignore_errors=True)


def _literal(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _alive(work: Path) -> bool:
    """Whether a process still holds the lock of an unfinished directory."""
    try:
        with (work / LOCK).open("w") as held:
            return not lock(held)
    except FileNotFoundError:
        return False


def lock(file: IO[Any]) -> bool:
    """Take the lock of an open file, until it is closed; False if another process holds it."""
    return lock_descriptor(file.fileno(), blocking=False)


def _flush_tree(root: Path) -> None:
    for path in (*root.rglob("*"), root):
        _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
