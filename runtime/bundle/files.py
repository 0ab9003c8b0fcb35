"""The bundle: the directory an export writes and the runtime reads (docs/bundle.md).

Its files are what its manifest says of them, or one `ResPruneError` names the first that is not.
"""

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resprune.names import DECODER
from resprune.runtime.bundle.external import require_listed
from resprune.runtime.bundle.hashes import hashed_meanwhile, sha256
from resprune.runtime.bundle.manifest import (
    LANGUAGE_GGUF,
    MANIFEST_NAME,
    FileSpec,
    GraphSpec,
    Manifest,
    safe_name,
)
from resprune.runtime.bundle.whole import write_whole
from resprune.runtime.errors import ResPruneError, one_line

# A manifest lists a few dozen files: anything near this size is not one.
MAX_MANIFEST_BYTES = 4 << 20
MAX_TEXT_BYTES = 16 << 20
"""Of a JSON file or a template of the checkpoint."""


@dataclass(frozen=True)
class Bundle:
    """A bundle whose manifest and files have been checked by `read_bundle`."""

    root: Path
    manifest: Manifest

    @property
    def nbytes(self) -> int:
        """Bytes of all its files, the manifest included."""
        files = sum(spec.size for spec in self.manifest.files.values())
        return files + (self.root / MANIFEST_NAME).stat().st_size

    def file_path(self, name: str) -> Path:
        """Path of a file that the manifest lists; `ResPruneError` if it does not list it."""
        if name not in self.manifest.files:
            raise ResPruneError(f"the bundle {self.root} has no {name}; export it again")
        return self.root / name

    def graph(self, name: str) -> GraphSpec:
        """A graph's entry in the manifest by its name, such as `vision_select`; `ResPruneError` if there is none."""
        if name == DECODER and not self.manifest.has_decoder:
            file = self.root / LANGUAGE_GGUF if LANGUAGE_GGUF in self.manifest.files else "FILE"
            raise ResPruneError(
                f"the bundle {self.root} was exported without a decoder: ask, chat, serve and bench answer with --gguf "
                f"{file} or --server URL; for anything else export it again with one"
            )
        if name not in self.manifest.graphs:
            have = ", ".join(sorted(self.manifest.graphs)) or "none"
            raise ResPruneError(
                f"the bundle {self.root} has no graph {name} (it has: {have}); export it again"
            )
        return self.manifest.graphs[name]

    def graph_path(self, name: str) -> Path:
        """Path of a graph's `.onnx` file by the graph's name, such as `vision_select`.

        `ResPruneError` if there is none, or if its weights are in a file that the manifest does not list.
        """
        file = self.graph(name).file
        require_listed(self.root, file, self.manifest.files)
        return self.file_path(file)

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the checkpoint, such as `config.json`; `ResPruneError` if it does not hold a JSON object."""
        path = self.file_path(name)
        try:
            value = json.loads(self.text(name))
        except (ValueError, RecursionError) as error:
            raise ResPruneError(
                f"{path} cannot be read as JSON ({one_line(error)}); export the bundle again"
            ) from None
        if not isinstance(value, dict):
            raise ResPruneError(f"{path} should hold a JSON object; export the bundle again")
        return value

    def text(self, name: str) -> str:
        """A text file of the checkpoint; `ResPruneError` if it is not UTF-8 or larger than `MAX_TEXT_BYTES`."""
        path = self.file_path(name)
        try:
            if path.stat().st_size > MAX_TEXT_BYTES:
                raise ResPruneError(f"{path} is larger than {MAX_TEXT_BYTES} bytes; export the bundle again")
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ResPruneError(
                f"{path} cannot be read as text ({one_line(error)}); export the bundle again"
            ) from None


def require_bundle(path: str | Path) -> Path:
    """`path` if it is a directory with a manifest, of which nothing is read; else `ResPruneError`."""
    if not isinstance(path, str | os.PathLike):
        raise ResPruneError(f"a bundle is given by its path, not {type(path).__name__}")
    root = Path(path)
    if not os.path.isdir(root):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
        raise ResPruneError(f"{root} is not a directory; give the directory that resprune export wrote")
    try:
        (root / MANIFEST_NAME).stat()
    except FileNotFoundError:
        raise ResPruneError(
            f"{root} has no {MANIFEST_NAME}, so it is not a bundle; make one with resprune export"
        ) from None
    except OSError as error:
        raise ResPruneError(f"{root / MANIFEST_NAME} cannot be read: {error.strerror}") from None
    return root


def read_bundle(path: str | Path, *, check_hashes: bool = True) -> Bundle:
    """Read the manifest in directory `path`; check that every file it lists is there and as it was written.

    Sizes are always compared; `check_hashes=False` leaves out the SHA-256 of the contents. Raises
    `ResPruneError`, naming the file, for one that is missing, altered, or outside the directory.
    """
    root = require_bundle(path)
    if _plain_file_size(root, MANIFEST_NAME) > MAX_MANIFEST_BYTES:
        raise ResPruneError(
            f"{root / MANIFEST_NAME} is larger than {MAX_MANIFEST_BYTES} bytes; export it again"
        )
    try:
        text = (root / MANIFEST_NAME).read_bytes()
    except OSError as error:
        raise ResPruneError(f"{root / MANIFEST_NAME} cannot be read: {error.strerror}") from None
    manifest = Manifest.from_json(text)
    for name, spec in manifest.files.items():
        size = _plain_file_size(root, name)
        if size != spec.size:
            raise ResPruneError(
                f"{root / name} has {size} bytes where {spec.size} were written; "
                f"copy the bundle again or export it again"
            )
    if check_hashes:
        with hashed_meanwhile(root, manifest.files, remember=False):
            pass
    return Bundle(root, manifest)


def write_manifest(root: str | Path, manifest: Manifest) -> None:
    """Write `resprune.json` into `root`, after checking that this version can read it.

    A reader sees the old manifest or the new one, never a part.
    """
    text = manifest.to_json()
    Manifest.from_json(text)
    write_whole(Path(root) / MANIFEST_NAME, text.encode())


def describe_files(root: str | Path, known: Mapping[Path, FileSpec] | None = None) -> dict[str, FileSpec]:
    """Size and SHA-256 of every file under `root` but the manifest, by its relative posix name, sorted.

    `known` has those that need not be read, because they were hashed when they were written.
    """
    root, known = Path(root), known or {}
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir())
    return {
        name: known.get(root / name) or describe_file(root, name) for name in names if name != MANIFEST_NAME
    }


def describe_file(root: Path, name: str) -> FileSpec:
    """Size and SHA-256 of one file under `root`, by its relative posix name."""
    return FileSpec(_plain_file_size(root, safe_name(name)), sha256(root / name))


def _plain_file_size(root: Path, name: str) -> int:
    """Bytes of `root/name`, refusing what is missing, no plain file, or a link that leaves `root`."""
    path = root / name
    try:
        if not path.resolve(strict=True).is_relative_to(root.resolve(strict=True)):
            raise ResPruneError(f"{path} points outside the bundle; copy the file into it")
        status = path.stat()
    except FileNotFoundError:
        raise ResPruneError(f"{path} is missing; copy the bundle again or export it again") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise ResPruneError(f"{path} cannot be read: {error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ResPruneError(f"{path} is not a plain file; copy the bundle again or export it again")
    return status.st_size
