"""What help, `inspect` and a mistake wait for, in modules that are imported: seconds depend on the machine."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

LARGE = (
    "torch", "transformers", "onnx", "onnxscript", "onnxruntime", "onnx_ir", "tokenizers", "huggingface_hub",
    "fastapi", "uvicorn", "pydantic", "matplotlib", "scipy", "tensorrt", "lmms_eval", "datasets", "jinja2",
)  # fmt: skip
# What a bundle's own commands need not even to say that a path is wrong.
MEDIUM = ("numpy", "PIL", "filelock")
PROGRAM = """
import json, sys
from resprune.runtime.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as leaving:
    status = leaving.code
print(json.dumps([status, sorted({name.partition(".")[0] for name in sys.modules})]), file=sys.stderr)
"""
RUNTIME = ("ask", "bench", "chat", "inspect", "prompt", "serve")
EXPORTER = ("build", "eval", "export", "lmms")


def run(*words: str, folder: Path) -> tuple[int, set[str], list[str]]:
    """Status, the packages that were imported, and what was said on stderr."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=True, cwd=folder
    )
    *said, last = done.stderr.splitlines()
    status, packages = json.loads(last)
    return status, set(packages), said


def test_the_errors_come_without_anything_large(tmp_path: Path) -> None:
    code = (
        "import sys; from resprune import FailedError, ResPruneError, UnavailableError; "
        "assert issubclass(FailedError, ResPruneError) and issubclass(UnavailableError, ResPruneError); "
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert not {*done.stdout.split()} & {*LARGE, *MEDIUM}


def test_the_folder_above_a_clone_finds_the_installed_package(tmp_path: Path) -> None:
    """The clone is called as the package is, and is none: the folder in it is."""
    (tmp_path / "resprune").symlink_to(Path(__file__).parents[1])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for words in (["-m", "resprune", "--help"], ["-c", "from resprune import ResPruneError"]):
        done = subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, cwd=tmp_path, env=environment
        )
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", ["", *RUNTIME, *EXPORTER])
def test_help_and_wrong_options_import_nothing_large(command: str, tmp_path: Path) -> None:
    words = [command] if command else []
    # The help of export lists the aliases of the families, whose table takes NumPy and Pillow.
    unwanted = {*LARGE} if command in ("", "export") else {*LARGE, *MEDIUM}
    status, packages, said = run(*words, "--help", folder=tmp_path)
    assert (status, said, packages & unwanted) == (0, [], set())
    status, packages, said = run(*words, "--wrong", folder=tmp_path)
    assert (status, len(said), packages & unwanted) == (2, 1, set())
    assert said[0].endswith("--help")


def test_inspect_imports_nothing_large(tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    bundle = str(tiny_bundle("clip-llama", k=7, split=True))
    for words in ([], ["--json"], ["--skip-hashes"]):
        status, packages, said = run("inspect", bundle, *words, folder=tmp_path)
        assert (status, said, packages & {*LARGE, *MEDIUM}) == (0, [], set())


BUNDLE = "none is not a directory"
WRONG_PATHS = {
    "ask none photo.png why?": BUNDLE,
    "ask bundle none.png why?": "there is no file none.png",
    "bench none": BUNDLE,
    "bench bundle --image none.png": "there is no file none.png",
    "chat none": BUNDLE,
    "chat bundle none.png": "there is no file none.png",
    "inspect none": BUNDLE,
    "prompt none why? --out x.json": BUNDLE,
    "serve bundle none": BUNDLE,
    "build none": BUNDLE,
}


@pytest.mark.parametrize("words", WRONG_PATHS)
def test_a_wrong_path_is_told_before_anything_is_imported(words: str, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "resprune.json").touch()
    (tmp_path / "photo.png").touch()
    status, packages, said = run(*words.split(), folder=tmp_path)
    assert (status, len(said), packages & {*LARGE, *MEDIUM}) == (2, 1, set())
    assert WRONG_PATHS[words] in said[0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("export none out -k 16", "none is not a directory, a hub id"),
        ("export /none/x out -k 16", "/none/x is not a directory, a hub id"),
        ("export empty out -k 16", "has no config.json"),
        ("export empty out -k 16 --revision main", "--revision is for a hub id"),
        ("export owner/name full -k 16", "full exists; choose another name"),
        ("export owner/name full -k 16 --force", "is not a bundle"),
        ("eval none --data scenes -k 16 --out x", "none is not a directory, a hub id"),
        ("lmms none --tasks resprune_scenes -k 16 --out x", "none is not a directory, a hub id"),
    ],
)
def test_a_wrong_path_is_told_before_pytorch_is_imported(words: str, says: str, tmp_path: Path) -> None:
    for name in ("empty", "full"):
        (tmp_path / name).mkdir()
    status, packages, said = run(*words.split(), folder=tmp_path)
    assert (status, len(said), packages & set(LARGE)) == (2, 1, set())
    assert says in said[0]
    assert not (tmp_path / "out").exists()
