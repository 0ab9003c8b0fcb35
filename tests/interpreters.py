"""The Pythons that devices have, and those of them on this machine."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# JetPack 6 has 3.10, Raspberry Pi OS 3.11, Ubuntu 24.04 3.12.
VERSIONS = ("3.10", "3.11", "3.12")


def interpreters() -> dict[str, Path]:
    """Version → an interpreter of it that runs. One that only a shim names is none."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    found = {here: Path(sys.executable)}
    for version in VERSIONS:
        runs = [path for path in _candidates(version) if version not in found and _runs(path, version)]
        if runs:
            found[version] = runs[-1]
    return found


def _candidates(version: str) -> Iterator[Path]:
    yield from (Path(folder, f"python{version}") for folder in os.get_exec_path())
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    yield from sorted(pyenv.glob(f"versions/{version}.*/bin/python{version}"))


def _runs(path: Path, version: str) -> bool:
    if not path.is_file():
        return False
    code = "import ensurepip, sys; print('{}.{}'.format(*sys.version_info))"
    done = subprocess.run([path, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() == version
