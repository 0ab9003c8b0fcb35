"""The answers of a run on disk, so that one that was interrupted goes on where it ended."""

import json
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from resprune.runtime.errors import ResPruneError


class Run(NamedTuple):
    """One way of asking a data set: a selector's name, a budget as it is written, and which draw of it."""

    data: str
    selector: str
    k: str
    seed: int


class Answers:
    """`answers-<data>.jsonl` in a directory: a line that says what is asked of what, then answers as they come."""

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        """Open or begin; `ResPruneError` if the directory holds the answers to something else.

        `settings` is what answers depend on beside the question and the run; its `data` has the fingerprint of every
        data set by name.
        """
        self._known: dict[Run, dict[int, str]] = {}
        self._files: dict[str, BinaryIO] = {}
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for data, fingerprint in settings["data"].items():
                self._files[data] = self._open(directory, data, settings | {"data": fingerprint})
        except OSError as error:
            self.close()
            raise ResPruneError(f"{directory} cannot be written ({error}); give another --out") from None

    def _open(self, directory: Path, data: str, settings: dict[str, Any]) -> BinaryIO:
        path = directory / f"answers-{data}.jsonl"
        # A run that was cut off may leave half a line.
        kept = path.read_bytes() if path.exists() else b""
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
        file = path.open("r+b" if kept else "wb")
        file.truncate(len(kept))
        file.seek(len(kept))
        if not kept:
            _write(file, settings)
        return file

    def missing(self, run: Run, numbers: list[int]) -> list[int]:
        """Those questions that have no answer yet."""
        known = self._known.get(run, {})
        return [number for number in numbers if number not in known]

    def add(self, run: Run, answers: dict[int, str]) -> None:
        """Note answers by the number of their question; another process can read them when this returns."""
        self._known.setdefault(run, {}).update(answers)
        row = {"selector": run.selector, "k": run.k, "seed": run.seed, "answers": answers}
        _write(self._files[run.data], row)

    def of(self, run: Run, numbers: list[int]) -> list[str]:
        """The answers to questions that all have one."""
        return [self._known[run][number] for number in numbers]

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


def _write(file: BinaryIO, row: dict[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    file.flush()
