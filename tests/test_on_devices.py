"""What devices run is read as Python 3.10 by both checkers: the lists agree, and lack nothing that is imported."""

import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Every command's parser, and what `resprune build` runs.
IMPORTED = """
import sys
from importlib.metadata import entry_points
from pathlib import Path
from resprune.runtime.cli import COMMANDS
for command in entry_points(group=COMMANDS):
    command.load()
import resprune.exporter.tensorrt.engines
print(*(module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] == "resprune"), sep="\\n")
"""


def files(pattern: str) -> set[Path]:
    """The files of a pattern as ruff reads it, in which a star is any number of folders at the end of one."""
    return set((ROOT / pattern[:-2]).rglob("*.py") if pattern.endswith("/*") else ROOT.glob(pattern))


def of_ruff() -> set[Path]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]
    return set().union(*map(files, settings["per-file-target-version"]))


def of_mypy() -> set[Path]:
    show = ["make", "--dry-run", "--no-print-directory", "--directory", ROOT, "lint"]
    lines = subprocess.run(show, capture_output=True, text=True, check=True).stdout.splitlines()
    (words,) = (line.split() for line in lines if "--python-version 3.10" in line)
    found: set[Path] = set()
    for kind, name in pairwise(words):
        path = name.removeprefix("resprune").lstrip(".").replace(".", "/") or "__init__"
        if kind == "-p":
            found |= files(f"{path}/*")
        elif kind == "-m":
            found |= files(f"{path}.py") or files(f"resprune/{path}.py")
    return found


def test_ruff_and_mypy_have_one_list() -> None:
    assert len(of_ruff()) > 100
    assert of_ruff() == of_mypy()


def test_nothing_that_devices_import_is_left_out() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True, cwd=ROOT
    )
    imported = {Path(line).resolve() for line in done.stdout.splitlines()}
    rooms = {ROOT / room / "__init__.py" for room in ("exporter", "evaluation")}  # docstrings
    assert len(imported) > 50
    assert imported - rooms <= of_ruff()
