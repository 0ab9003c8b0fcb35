"""Runs cases in one process: `python -m tests.hostile.worker WORLD.json SEED FIRST LAST KINDS` prints a line for each.

`WORLD.json` has the paths of a `World`. Before a case the line {"case": n, "pid": …} is printed, after it its `Result`.
"""

import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any, TextIO

from tests.hostile.case import Case, World
from tests.hostile.guard import forbid_sockets

SHARES = {"image": 31, "bundle": 34, "option": 22, "server": 11, "checkpoint": 2}
"""Of a hundred cases. A checkpoint that is accepted is exported, which takes a hundred times as long as a question."""
MODULES = {kind: f"tests.hostile.{kind}s" for kind in SHARES}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass
class Result:
    """What became of a case: `wrong` names each promise that was broken."""

    number: int
    kind: str
    what: str
    status: int
    seconds: float
    megabytes: float
    out: str
    err: str
    wrong: list[str]


def kind_of(number: int, kinds: Sequence[str]) -> str:
    """The kind of a case, by its number."""
    chosen = [kind for kind in SHARES if kind in kinds]
    return Random(number * 7919).choices(chosen, [SHARES[kind] for kind in chosen])[0]


class Watch:
    """Notes files and connections that Python opens outside of what a case may use."""

    def __init__(self, world: World) -> None:
        places = [
            sys.prefix,
            sys.base_prefix,
            Path(__file__).parents[2],
            "/proc",
            "/sys",
            "/usr",
            "/etc",
            "/lib",
            "/dev",
        ]
        self._read = [str(Path(place).resolve()) for place in places]
        self._read += [
            str(path) for path in (world.photo, *world.bundles.values(), *world.checkpoints.values())
        ]
        self.folder: str | None = None
        self.words: Sequence[str] = ()
        self.seen: list[str] = []
        # Python's own files, wherever a module is imported late: none is written, nor read from another place.
        sys.dont_write_bytecode, sys.pycache_prefix = True, None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event == "open" and isinstance(arguments[0], str | bytes):
            path, mode, flags = os.fsdecode(arguments[0]), str(arguments[1] or ""), arguments[2] or 0
            writes = bool(flags & WRITING) or any(letter in mode for letter in "wax+")
            self._path(path, "written" if writes else "read")
        elif event in ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod"):
            self._path(os.fsdecode(arguments[0]), event)
        elif event == "socket.connect" and arguments[1][0] != "127.0.0.1":
            self.seen.append(f"connected to {arguments[1]}")
        elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"):
            self.seen.append(event)

    def _path(self, path: str, what: str) -> None:
        full = os.path.abspath(path)  # noqa: PTH100 - it may not be followed, nor be valid
        allowed = [self.folder, "/dev/null"] if what != "read" else [self.folder, *self._read]
        if not any(full == place or full.startswith(f"{place}/") for place in allowed if place):
            if what == "read" and path in self.words:
                return
            self.seen.append(f"{path[:200]!a} {what}")


def run(case: Case, number: int, watch: Watch, folder: Path) -> Result:
    """Run the command with its output caught, and compare what came of it with what was promised."""
    from resprune.runtime.cli import main

    watch.words, watch.seen = case.words, []
    start_bytes, started = _reset_peak(), time.process_time()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        saved = os.dup(1), os.dup(2)
        streams = sys.stdout, sys.stderr
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - a descriptor
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        try:
            with case.around():
                watch.folder = (
                    None if case.kind == "checkpoint" else str(folder)
                )  # PyTorch has caches of its own
                status = _status(main, case.words)
                watch.folder = None
            _flush(sys.stdout)
            _flush(sys.stderr)
        finally:
            sys.stdout, sys.stderr = streams
            for descriptor, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)
        seconds = time.process_time() - started
        megabytes = (_peak() - start_bytes) / 1e6
        out.seek(0)
        err.seek(0)
        said = out.read().decode("utf-8", "replace")
        complained = err.read().decode("utf-8", "replace")
    result = Result(
        number, case.kind, case.what, status, seconds, megabytes, said, complained, list(watch.seen)
    )
    result.wrong += _broken(case, result)
    return result


def _status(main: Any, words: Sequence[str]) -> int:
    try:
        return int(main(words))
    except SystemExit as leaving:
        return int(leaving.code or 0)
    except BaseException:
        traceback.print_exc()
        return -1


def _flush(stream: TextIO) -> None:
    with suppress(OSError, ValueError):
        stream.flush()


def _broken(case: Case, result: Result) -> list[str]:
    """The promises that this result breaks."""
    wrong = []
    if result.status not in (0, 1, 2):
        wrong.append(f"status {result.status}")
    if "Traceback" in result.err or "panicked" in result.err:
        wrong.append("a traceback")
    lines = [line for line in result.err.split("\n") if line]
    if len(lines) > 1 and not (case.kind == "checkpoint" and result.status == 1):
        wrong.append(f"{len(lines)} lines on stderr")
    if result.status == 2 and not (lines and lines[0].startswith("resprune: ")):
        wrong.append("status 2 without a line that says why")
    if result.status == 0 and lines:
        wrong.append("an answer, and something on stderr")
    if any(
        not character.isprintable() and character not in "\n\t" and ord(character) < 0xA0
        for character in result.out + result.err
    ):
        wrong.append("control characters")
    if result.seconds > 20:
        wrong.append(f"{result.seconds:.0f} s")
    if result.megabytes > 1000:
        wrong.append(f"{result.megabytes:.0f} MB more than at its start")
    if result.status == 0 and case.refused:
        wrong.append("it was accepted")
    if result.status == 0 and case.expected is not None:
        expected = case.expected()
        if result.out != expected:
            wrong.append(f"the output should be {expected!a}")
    return wrong


def _reset_peak() -> int:
    """Let Linux forget the most memory that this process had; its memory in bytes now."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def make(number: int, seed: int, kinds: Sequence[str], folder: Path, world: World) -> Case:
    """The case with this number: the same for the same seed."""
    made: Case = import_module(MODULES[kind_of(number, kinds)]).make(
        Random(seed * 1_000_003 + number), folder, world
    )
    return made


def main(words: Sequence[str]) -> None:
    """See the module."""
    paths = json.loads(Path(words[0]).read_text())
    world = World(
        *({name: Path(path) for name, path in paths[key].items()} for key in ("bundles", "checkpoints")),
        Path(paths["photo"]),
    )
    seed, first, last, kinds = int(words[1]), int(words[2]), int(words[3]), words[4].split(",")
    if not set(kinds) & {"server", "checkpoint"}:
        forbid_sockets()  # whatever library it is that opens them
    watch = Watch(world)
    channel = os.fdopen(os.dup(1), "w")
    for number in range(first, last):
        print(json.dumps({"case": number, "pid": os.getpid()}), file=channel, flush=True)
        folder = Path(tempfile.mkdtemp(prefix=f"case-{number}-", dir=Path(words[0]).parent)).resolve()
        try:
            result = run(make(number, seed, kinds, folder, world), number, watch, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        result.out, result.err = result.out[:2000], result.err[:4000]
        print(json.dumps(asdict(result)), file=channel, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
