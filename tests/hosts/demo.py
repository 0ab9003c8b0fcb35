"""What hosts are asked about the demo model: its pictures, the questions to them, and its bundles."""

import json
from pathlib import Path

from tests.hosts.npm import ROOT

PICTURES = ROOT / "demo" / "pictures"
QUESTIONS = json.loads((PICTURES / "questions.json").read_text(encoding="utf-8"))


def copy_of(bundle: Path, target: Path) -> Path:
    """A bundle of the same files, linked but for the small ones, which a test may write to."""
    for file in bundle.rglob("*"):
        copy = target / file.relative_to(bundle)
        if file.is_dir():
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix in (".json", ".jinja"):
            copy.write_bytes(file.read_bytes())
        else:
            copy.hardlink_to(file)
    return target
