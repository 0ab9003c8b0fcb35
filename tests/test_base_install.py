"""A device: an empty environment with the base install alone runs a bundle, on every Python that devices have."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interpreters import interpreters

ROOT = Path(__file__).parent.parent
MEGABYTES = 235
"""Without pip."""


INTERPRETERS = interpreters()
SERVER = {"fastapi", "starlette", "pydantic", "pydantic_core", "uvicorn", "prometheus_client"}
"""What the extra `serve` brings."""
IMPORT_ALL = """
import importlib, json, pkgutil, resprune
missing, count = [], 0
for room in ("runtime", "serving", ""):
    package = importlib.import_module(f"resprune.{room}".rstrip("."))
    walk = pkgutil.walk_packages if room else pkgutil.iter_modules
    for module in walk(package.__path__, package.__name__ + "."):
        if not room and module.ispkg:  # another room
            continue
        count += 1
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            missing.append(error.name)
print(json.dumps([resprune.__file__, count, missing]))
"""


def megabytes(site_packages: Path) -> int:
    """What the files take up on the disk."""
    return sum(path.lstat().st_blocks for path in site_packages.rglob("*")) * 512 // 10**6


def follow_the_dockerfile(folder: Path, environment: dict[str, str]) -> None:
    """Do in the empty `folder` what the steps of the Dockerfile do in an image, with the `pip` that PATH has."""
    steps = re.findall(r"^([A-Z]+) (.*)$", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    for instruction, what in steps:
        if instruction == "COPY":
            assert what == ". ."
            kept = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), flags=re.MULTILINE)
            for name in kept:
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, folder / name, symlinks=True)
                else:
                    shutil.copy(ROOT / name, folder / name)
        elif instruction == "RUN":
            subprocess.run(["bash", "-ec", what], check=True, cwd=folder, env=environment)
        else:  # changes no file
            assert instruction in {"FROM", "WORKDIR", "ARG", "USER", "ENTRYPOINT"}
    assert ("ENTRYPOINT", '["resprune"]') in steps


@pytest.mark.parametrize("version", INTERPRETERS)
def test_base_install_answers_without_torch(version, tmp_path, demo_bundle):
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "EXTRA")}
    environment = tmp_path / "environment"
    subprocess.run([INTERPRETERS[version], "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python)]  # one of its own would take 3 s to install
    python.with_name("pip").write_text(f'#!/bin/sh\nexec {shlex.join(pip)} "$@"\n')
    python.with_name("pip").chmod(0o755)
    image = tmp_path / "resprune"  # what runs in the folder above it finds the installed package
    image.mkdir()
    follow_the_dockerfile(image, clean | {"PATH": f"{python.parent}{os.pathsep}{clean['PATH']}"})

    def resprune(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [environment / "bin" / "resprune", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=clean)

    picture = next((ROOT / "demo" / "pictures").glob("*.png"))
    done = resprune("ask", demo_bundle, picture, "What color is the circle?", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["token_ids"]
    imported = subprocess.run(
        [python, "-c", IMPORT_ALL], capture_output=True, text=True, check=False, cwd=tmp_path, env=clean
    )
    assert imported.returncode == 0, imported.stderr
    file, count, missing = json.loads(imported.stdout)
    assert Path(file).is_relative_to(environment)
    assert count > 80
    assert {*missing} <= SERVER
    listed = subprocess.run([*pip, "list"], capture_output=True, text=True, check=True).stdout
    for heavy in ("torch", "transformers", "onnxscript", "scikit"):
        assert heavy not in listed
    export = resprune("export", "demo", tmp_path / "out", "-k", "16")
    assert export.returncode == 2
    way_out = "needs Python 3.11" if version == "3.10" else 'pip install "resprune[export]"'
    assert way_out in export.stderr
    assert len(export.stderr.strip().splitlines()) == 1
    (site_packages,) = environment.glob("lib/python*/site-packages")
    assert megabytes(site_packages) <= MEGABYTES
