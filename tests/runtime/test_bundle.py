import dataclasses
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from resprune.runtime.bundle.files import MAX_MANIFEST_BYTES, describe_files, read_bundle, write_manifest
from resprune.runtime.bundle.manifest import MANIFEST_NAME
from resprune.runtime.errors import ResPruneError
from tests.runtime.bundles import MANIFEST, one_sentence


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "bundle"
    (root / "onnx").mkdir(parents=True)
    (root / "onnx/vision_select.onnx").write_bytes(b"graph")
    (root / "engines/tensorrt-rtx-sm_86").mkdir(parents=True)
    (root / "engines/tensorrt-rtx-sm_86/vision_select.engine").write_bytes(b"engine")
    (root / "config.json").write_bytes(b'{"model_type": "llava"}')
    write_manifest(root, MANIFEST)
    return root


def refused(root: Path, **options: bool) -> str:
    with pytest.raises(ResPruneError) as caught:
        read_bundle(root, **options)
    return one_sentence(caught.value)


def test_what_was_written_is_read(root: Path) -> None:
    bundle = read_bundle(str(root))
    assert bundle.manifest == MANIFEST
    assert bundle.file_path("onnx/vision_select.onnx").read_bytes() == b"graph"
    assert bundle.json("config.json") == {"model_type": "llava"}


def test_files_are_described_without_the_manifest(root: Path) -> None:
    assert describe_files(root) == MANIFEST.files


def test_parity_without_a_number_is_never_written(root: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_manifest(root, dataclasses.replace(MANIFEST, parity={"x": float("nan")}))


def test_a_manifest_that_would_not_be_read_is_not_written(root: Path) -> None:
    with pytest.raises(ResPruneError, match="context_length"):
        write_manifest(root, dataclasses.replace(MANIFEST, context_length=0))
    assert read_bundle(root).manifest == MANIFEST


def test_no_directory_no_manifest(tmp_path: Path, root: Path) -> None:
    assert "is not a directory" in refused(tmp_path / "nothing")
    assert "is not a directory" in refused(root / "config.json")
    assert "has no resprune.json" in refused(tmp_path)
    assert "is not a directory" in refused(tmp_path / ("a" * 256))


def test_a_folder_that_is_closed_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may be run by root, who may read anything."""
    usual = os.stat

    def refuse(path: Any, **keywords: Any) -> os.stat_result:
        if Path(path).parent == root:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return usual(path, **keywords)

    monkeypatch.setattr("os.stat", refuse)
    assert refused(root) == f"{root / MANIFEST_NAME} cannot be read: Permission denied"


def test_a_huge_manifest_is_not_read(root: Path) -> None:
    with (root / MANIFEST_NAME).open("ab") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    assert "larger than" in refused(root)


def test_a_missing_file_is_named(root: Path) -> None:
    (root / "config.json").unlink()
    assert "config.json is missing" in refused(root)


def test_a_file_cut_short_is_named_even_without_hashes(root: Path) -> None:
    (root / "onnx/vision_select.onnx").write_bytes(b"grap")
    assert "vision_select.onnx has 4 bytes where 5 were written" in refused(root, check_hashes=False)


def test_an_altered_file_is_named_unless_hashes_are_not_wanted(root: Path) -> None:
    (root / "onnx/vision_select.onnx").write_bytes(b"Graph")
    assert "vision_select.onnx was altered" in refused(root)
    read_bundle(root, check_hashes=False)


def test_links_may_stay_inside_but_not_leave(root: Path, tmp_path: Path) -> None:
    graph = root / "onnx/vision_select.onnx"
    graph.rename(root / "stored.onnx")
    graph.symlink_to("../stored.onnx")
    read_bundle(root)
    (root / "stored.onnx").rename(tmp_path / "outside.onnx")
    graph.unlink()
    graph.symlink_to(tmp_path / "outside.onnx")
    assert "points outside the bundle" in refused(root)
    assert "points outside the bundle" in refused(root, check_hashes=False)
    with pytest.raises(ResPruneError, match="points outside"):
        describe_files(root)


def test_a_linked_directory_may_not_leave(root: Path, tmp_path: Path) -> None:
    (root / "onnx").rename(tmp_path / "elsewhere")
    (root / "onnx").symlink_to(tmp_path / "elsewhere")
    assert "points outside the bundle" in refused(root)


def test_a_linked_manifest_may_not_leave(root: Path, tmp_path: Path) -> None:
    (root / MANIFEST_NAME).rename(tmp_path / "manifest")
    (root / MANIFEST_NAME).symlink_to(tmp_path / "manifest")
    assert "points outside the bundle" in refused(root)


def test_a_link_to_the_whole_bundle_is_fine(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    read_bundle(tmp_path / "link")


def test_a_loop_of_links_is_refused(root: Path) -> None:
    (root / "config.json").unlink()
    (root / "config.json").symlink_to("config.json")
    assert "config.json" in refused(root)


def test_a_pipe_is_refused_and_not_waited_for(root: Path) -> None:
    (root / "config.json").unlink()
    os.mkfifo(root / "config.json")
    assert "is not a plain file" in refused(root)


def test_a_file_or_graph_the_bundle_does_not_have(root: Path) -> None:
    bundle = read_bundle(root)
    with pytest.raises(ResPruneError, match="has no tokenizer"):
        bundle.file_path("tokenizer.json")
    with pytest.raises(ResPruneError, match=r"has no graph token_select \(it has: vision_select\)"):
        bundle.graph_path("token_select")
    with pytest.raises(ResPruneError, match="cannot be read as JSON"):
        bundle.json("onnx/vision_select.onnx")
