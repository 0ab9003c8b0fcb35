"""Bundles made by hand, for tests of a single file in them; what answers is a real export (conftest.py)."""

from collections.abc import Mapping
from pathlib import Path

from resprune.runtime.bundle import Bundle, FileSpec, Manifest, Selection


def bundle_of_files(root: Path, files: Mapping[str, str], *, image_token_id: int = 0) -> Bundle:
    """A bundle without graphs that holds these texts, by name."""
    for name, text in files.items():
        (root / name).write_text(text, encoding="utf-8")
    manifest = Manifest(
        format_version=1,
        family="llava",
        model="made-by-hand",
        revision=None,
        selection=Selection(k=4, num_tokens=9, alpha=1.0, scale="minmax", body="loop"),
        positions="contiguous",
        image_token_id=image_token_id,
        context_length=64,
        graphs={},
        files={name: FileSpec(0, "0" * 64) for name in files},
        versions={},
        command="",
        parity={},
        created="",
    )
    return Bundle(root, manifest)
