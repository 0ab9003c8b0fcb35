"""Bundles made by hand, for tests of a single file in them; what answers is a real export (conftest.py)."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from resprune.method import Selection
from resprune.runtime.bundle.files import Bundle
from resprune.runtime.bundle.manifest import (
    EngineSet,
    EngineSpec,
    FileSpec,
    GraphSpec,
    Manifest,
    TensorSpec,
)
from resprune.runtime.errors import ResPruneError

MANIFEST = Manifest(
    format_version=1,
    family="llava",
    model="demo",
    revision=None,
    selection=Selection(k=16, num_tokens=144, form="linear"),
    positions="contiguous",
    image_token_id=7,
    context_length=512,
    graphs={
        "vision_select": GraphSpec(
            file="onnx/vision_select.onnx",
            precision="fp32",
            inputs=(TensorSpec("pixel_values", "float32", ("batch_size", 3, 96, 96)),),
            outputs=(TensorSpec("kept_indices", "int64", ("batch_size", 16)),),
        )
    },
    files={
        "config.json": FileSpec(23, hashlib.sha256(b'{"model_type": "llava"}').hexdigest()),
        "engines/tensorrt-rtx-sm_86/vision_select.engine": FileSpec(6, hashlib.sha256(b"engine").hexdigest()),
        "onnx/vision_select.onnx": FileSpec(5, hashlib.sha256(b"graph").hexdigest()),
    },
    versions={"onnx": "1.23.2"},
    command="resprune export demo out -k 16",
    parity={"vision_select": {"image_features": {"max_abs_diff": 3.1e-06}}},
    created="2026-11-23T15:00:00Z",
    engines={
        "tensorrt-rtx-sm_86": EngineSet(
            flavour="tensorrt-rtx",
            target="sm_86",
            graphs={
                "vision_select": EngineSpec(
                    file="engines/tensorrt-rtx-sm_86/vision_select.engine",
                    sources={"onnx/vision_select.onnx": hashlib.sha256(b"graph").hexdigest()},
                    versions={"tensorrt-rtx": "1.7.1.116"},
                    profiles=({"batch_size": (1, 1, 4)},),
                )
            },
        )
    },
)


def one_sentence(error: ResPruneError) -> str:
    message = str(error)
    assert message.isprintable(), "a message is one line that any terminal can print"
    assert len(message) < 400
    return message


def bundle_of_files(root: Path, files: Mapping[str, str], *, image_token_id: int = 0) -> Bundle:
    """A bundle without graphs that holds these texts, by name."""
    for name, text in files.items():
        (root / name).write_text(text, encoding="utf-8")
    manifest = Manifest(
        format_version=1,
        family="llava",
        model="made-by-hand",
        revision=None,
        selection=Selection(k=4, num_tokens=9),
        positions="contiguous",
        image_token_id=image_token_id,
        context_length=4096,
        graphs={},
        files={name: FileSpec(0, "0" * 64) for name in files},
        versions={},
        command="",
        parity={},
        created="",
    )
    return Bundle(root, manifest)
