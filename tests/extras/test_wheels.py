"""What a device installs has wheels for 64-bit ARM, so nothing is compiled on a Jetson or a Raspberry Pi."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.interpreters import VERSIONS

ROOT = Path(__file__).parent.parent.parent
# glibc of Ubuntu 22.04 is 2.35, of Raspberry Pi OS 2.36 or newer.
PLATFORMS = [f"manylinux_2_{minor}_aarch64" for minor in (28, 27, 17)]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_base_install_has_wheels_for_aarch64(version, tmp_path):
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    place = ["--target", tmp_path, "--only-binary=:all:", f"--python-version={version}"]
    platforms = [f"--platform={platform}" for platform in PLATFORMS]
    done = subprocess.run(
        [*command, *place, *platforms, "--report=-", *needed], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    chosen = {item["metadata"]["name"].lower() for item in json.loads(done.stdout)["install"]}
    assert {"numpy", "onnxruntime", "tokenizers", "pillow"} <= chosen
