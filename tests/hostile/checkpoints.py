"""Checkpoints: one field, one file or one byte of a whole checkpoint changed, given to `resprune export`."""

import json
import os
import shutil
import struct
from pathlib import Path
from random import Random

from tests.hostile.bundles import TEMPLATES, write
from tests.hostile.case import Case, World
from tests.hostile.values import damaged, with_one_changed, written


def make(random: Random, folder: Path, world: World) -> Case:
    """A case about a checkpoint."""
    name = random.choice(list(world.checkpoints))
    root = folder / "checkpoint"
    shutil.copytree(world.checkpoints[name], root, copy_function=os.link)
    what = random.choice([_json, _json, _weights, _weights, _missing, _template])(random, root)
    words = ["export", str(root), str(folder / "out"), "-k", "4"]
    return Case("checkpoint", f"{name}: {what}", words, reason="export compares what it writes with PyTorch")


def _json(random: Random, root: Path) -> str:
    path = random.choice(sorted(root.glob("*.json")))
    if random.random() < 0.3:
        write(path, damaged(random, path.read_bytes()))
        return f"bytes of {path.name}"
    tree, place = with_one_changed(random, json.loads(path.read_bytes()))
    write(path, written(tree))
    return f"{path.name} {place}"


def _weights(random: Random, root: Path) -> str:
    path = random.choice(sorted(root.glob("*.safetensors")))
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    if random.random() < 0.4:
        write(path, damaged(random, content[: 8 + size]) + content[8 + size :])
        return f"bytes of the header of {path.name}"
    tree, place = with_one_changed(random, json.loads(content[8 : 8 + size]))
    header = written(tree)
    write(path, struct.pack("<Q", len(header)) + header + content[8 + size :])
    return f"{path.name} {place}"


def _missing(random: Random, root: Path) -> str:
    path = random.choice(sorted(path for path in root.iterdir() if path.is_file()))
    path.unlink()
    if random.random() < 0.3:
        path.mkdir()
    elif random.random() < 0.3:
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    return f"without {path.name}"


def _template(random: Random, root: Path) -> str:
    template = random.choice(TEMPLATES)
    write(root / "chat_template.jinja", template.encode())
    return f"template {template[:40]!a}"
