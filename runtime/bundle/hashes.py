"""SHA-256 of a bundle's files: in threads, large ones while the sessions open, and not again while they are unchanged.

What was checked is remembered in the user's cache, by size, times and inode, never in the bundle.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Lock
from typing import Any

from resprune.runtime.bundle.manifest import FileSpec
from resprune.runtime.bundle.whole import write_whole
from resprune.runtime.errors import ResPruneError

HASH_BLOCK = 1 << 20
LARGE_BYTES = 64 << 20
"""Smaller files are checked before anything is opened: a damaged graph is then never read by ONNX Runtime. A bundle of
small files alone is not remembered."""
RECENT_NS = 2_000_000_000
"""A file that changed so recently may change once more without its times telling; it is not remembered."""

Progress = Callable[[int, int], object]
"""Is called with the bytes that were hashed and those that are to be, by any thread."""


def sha256(path: Path, advance: Callable[[int], object] = lambda count: None) -> str:
    """SHA-256 of a file, in lower-case hexadecimal; `advance(count)` is called as `count` more bytes were read."""
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(HASH_BLOCK):  # hashlib.file_digest is Python 3.11's
                digest.update(block)
                advance(len(block))
            return digest.hexdigest()
    except OSError as error:
        raise ResPruneError(f"{path} cannot be read: {error.strerror}") from None


@contextmanager
def hashed_meanwhile(
    root: Path, files: Mapping[str, FileSpec], *, remember: bool = True, progress: Progress | None = None
) -> Iterator[None]:
    """Check the hashes of `files` under `root`: small ones now, large ones in threads while the block runs.

    Raises `ResPruneError` for the first that was altered; after the block for a large one, in place of an error of the
    block, whose cause it is. With `remember` files that did not change since they were last checked are passed over.
    """
    large = any(spec.size >= LARGE_BYTES for spec in files.values())
    stamps = _Stamps(root) if remember and large else None  # the others are hashed in no time
    states = {name: _state(root / name, spec) for name, spec in files.items()}
    fresh = {name: spec for name, spec in files.items() if not (stamps and stamps.has(name, states[name]))}
    count = _Count(sum(spec.size for spec in fresh.values()), progress)
    threads = ThreadPoolExecutor(max(2, min(4, os.cpu_count() or 1)))
    try:
        started: dict[str, Future[str]] = {
            name: threads.submit(sha256, root / name, count.advance)
            for name in sorted(fresh, key=lambda name: fresh[name].size)
        }
        _require(root, fresh, {name: one for name, one in started.items() if fresh[name].size < LARGE_BYTES})
        try:
            yield
        except Exception:
            _require(root, fresh, started)
            raise
        _require(root, fresh, started)
    finally:
        count.stop()
        threads.shutdown(cancel_futures=True)
    if stamps and fresh:
        stamps.write(states)


def _require(root: Path, files: Mapping[str, FileSpec], found: Mapping[str, "Future[str]"]) -> None:
    for name, spec in files.items():
        if name in found and found[name].result() != spec.sha256:
            raise ResPruneError(
                f"{root / name} was altered after the export (its SHA-256 differs); "
                f"copy the bundle again or export it again"
            )


class _Count:
    """Bytes hashed by all threads; once stopped, the threads stop at their next block."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress = total, progress
        self._done = 0
        self._lock = Lock()
        self._over = Event()

    def advance(self, count: int) -> None:
        if self._over.is_set():
            raise RuntimeError("nobody waits for this hash any more")
        with self._lock:
            self._done += count
            if self._progress is not None:
                self._progress(self._done, self._total)

    def stop(self) -> None:
        self._over.set()


class _Stamps:
    """What is known of the files under `root` that were checked; an unreadable cache knows nothing and is no error."""

    def __init__(self, root: Path) -> None:
        self._known: dict[str, Any] = {}
        self._path: Path | None = None
        with suppress(OSError, RuntimeError, ValueError):  # no home, a loop of links, no JSON
            cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
            name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:32]
            self._path = Path(cache) / "resprune" / "checked" / f"{name}.json"
            known = json.loads(self._path.read_bytes())
            self._known = known if isinstance(known, dict) else {}

    def has(self, name: str, state: list[Any]) -> bool:
        return self._known.get(name) == state

    def write(self, states: Mapping[str, list[Any]]) -> None:
        if self._path is None:
            return
        before = time.time_ns() - RECENT_NS
        old = {name: state for name, state in states.items() if max(state[1:3]) < before}
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, json.dumps(old).encode())


def _state(path: Path, spec: FileSpec) -> list[Any]:
    """By which a file is known again: a change of its content that leaves all of this takes a debugger."""
    try:
        status = path.stat()
    except OSError as error:
        raise ResPruneError(f"{path} cannot be read: {error.strerror}") from None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, spec.sha256]
