"""The answers of a run on disk, so that one that was interrupted goes on where it ended."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from resprune.exporter.transaction import lock
from resprune.runtime.errors import ResPruneError


@contextmanager
def output(directory: Path) -> Iterator[None]:
    """Make a directory, which is taken away again if nothing was written into it; `ResPruneError` if it cannot be."""
    made = False
    try:
        made = not directory.exists()
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResPruneError(f"{directory} cannot be written ({error.strerror}); give another --out") from None
    try:
        yield
    finally:
        if made:
            with suppress(OSError):  # there is something in it
                directory.rmdir()


class Run(NamedTuple):
    """One way of asking the data set `data`: a selector's name, a budget as written ("16", "11%"), a draw's seed."""

    data: str
    selector: str
    k: str
    seed: int


class Answers:
    """`answers-<data>.jsonl` in a directory: a line that says what is asked of what, then answers as they come."""

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        """Open or begin; `ResPruneError` if the directory holds the answers to something else, or another run writes.

        `settings` is what answers depend on beside the question and the run; its `data` has the fingerprint of every
        data set by name.
        """
        self._known: dict[Run, dict[int, str]] = {}
        self._files: dict[str, BinaryIO] = {}
        self._begun: list[str] = []
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for data, fingerprint in settings["data"].items():
                self._open(directory / f"answers-{data}.jsonl", data, settings | {"data": fingerprint})
        except OSError as error:
            self.close()
            raise ResPruneError(f"{directory} cannot be written ({error}); give another --out") from None
        except ResPruneError:
            self.close()
            raise

    def _open(self, path: Path, data: str, settings: dict[str, Any]) -> None:
        file = path.open("ab")
        if not lock(file):
            file.close()
            raise ResPruneError(f"another run writes {path}; wait for it, or give another --out")
        self._files[data] = file
        # A run that was cut off may leave half a line.
        kept = path.read_bytes()
        kept = kept[: kept.rfind(b"\n") + 1]
        try:
            rows = [json.loads(line) for line in kept.splitlines()]
            for row in rows[1:]:
                run = Run(data, row["selector"], row["k"], row["seed"])
                self._known.setdefault(run, {}).update({int(n): text for n, text in row["answers"].items()})
            changed = [key for key in settings if rows and rows[0].get(key) != settings[key]]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ResPruneError(f"{path} is damaged; delete it or give another --out") from None
        if changed:
            raise ResPruneError(
                f"{path} holds answers of another {', '.join(changed)}; give another --out, or delete it"
            )
        file.truncate(len(kept))
        if not kept:
            self._begun.append(data)
            _write(file, settings)

    def missing(self, run: Run, numbers: list[int]) -> list[int]:
        """Those questions that have no answer yet."""
        known = self._known.get(run, {})
        return [number for number in numbers if number not in known]

    def add(self, run: Run, answers: dict[int, str]) -> None:
        """Note answers by the number of their question; another process can read them when this returns.

        Raises `ResPruneError` where the disk is full.
        """
        self._known.setdefault(run, {}).update(answers)
        row = {"selector": run.selector, "k": run.k, "seed": run.seed, "answers": answers}
        _write(self._files[run.data], row)

    def of(self, run: Run, numbers: list[int]) -> list[str]:
        """The answers to the questions `numbers`, in that order; `KeyError` for one without an answer."""
        return [self._known[run][number] for number in numbers]

    def close(self) -> None:
        """Close the files; of what was begun without an answer nothing is left."""
        for data in set(self._begun) - {run.data for run in self._known}:
            with suppress(OSError):
                Path(self._files[data].name).unlink()
        for file in self._files.values():
            with suppress(OSError):  # of a line that could not be written, which `add` has said
                file.close()


def _write(file: BinaryIO, row: dict[str, Any]) -> None:
    try:
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        file.flush()
    except OSError as error:
        raise ResPruneError(
            f"{file.name} cannot be written ({error.strerror}); make room and run the same command again: it goes on"
        ) from None
