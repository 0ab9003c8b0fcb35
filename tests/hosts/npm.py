"""Installing npm packages as the lock file beside them says, and running Node."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def install(folder: Path) -> Path:
    """`npm ci` in `folder`, once for each state of its lock file."""
    lock = (folder / "package-lock.json").read_text(encoding="utf-8")
    done = folder / "node_modules" / ".installed"
    if not done.exists() or done.read_text(encoding="utf-8") != lock:
        # Install scripts would fetch CUDA's libraries; the CPU's are in the packages.
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        made = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stderr
        done.write_text(lock, encoding="utf-8")
    return folder


def install_copy(source: Path, name: str) -> Path:
    """A copy of the files in `source`, installed under build/hosts/."""
    folder = ROOT / "build" / "hosts" / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file():
            shutil.copy2(file, folder)
    return install(folder)


def node(script: Path, *words: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a script to its end."""
    command = ["node", str(script), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
