"""docs/bundle.md tells the tensors of every graph, as bundles have them, and its Python runs."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resprune.runtime.bundle.files import read_bundle
from resprune.runtime.bundle.manifest import TensorSpec

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "bundle.md").read_text(encoding="utf-8")
TENSOR = re.compile(r"`([a-z_]+(?:\.\{i\})?(?:\.key)?)`(?: \[([^\]]+)\])?(?: (int64|bool|float32))?")
# As other tests export them.
BUNDLES: dict[str, dict[str, Any]] = {
    "qwen3": {"share": 1.0, "split": True},
    "gemma3": {"share": 1.0, "split": True},
    "onevision": {"share": 1.0, "split": True},
    "qwen25": {"k": 3, "early": "50%:50%", "split": True, "attention": "proportional"},
}


def rows(head: str) -> list[list[str]]:
    """The cells of the table that begins so, line by line."""
    table = PAGE[PAGE.index(head) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


GRAPHS = {
    (graph, kind): cell
    for graph, *cells in rows("| graph | inputs |")
    for kind, cell in zip(("inputs", "outputs"), cells, strict=True)
}
FURTHER = rows("| name | where |")
OF_FAMILIES = " ".join(f"`pixel_values` {pixels} {more}" for _, pixels, more in rows("| family | `pixel"))


def told(graph: str, kind: str, tensor: TensorSpec) -> list[tuple[str, str]]:
    """Shape and dtype, empty where they are not said again, at every place that tells this tensor of a graph."""
    name = re.sub(r"\.\d+", ".{i}", tensor.name).replace(".value", ".key")
    places = GRAPHS[graph, kind]
    if kind == "inputs" and graph.startswith("vision"):
        places += OF_FAMILIES
    further = [
        (shape, dtype)
        for given, where, shape, _ in FURTHER
        if given == f"`{name}`"
        and any(
            kind[:-1] in part
            and (graph in part or "both" in part or ("decoder" in graph and "decoder" in part))
            for part in where.split(";")
        )
        for _, shape, dtype in TENSOR.findall(f"`x` {shape}")
    ]
    return [(shape, dtype) for one, shape, dtype in TENSOR.findall(places) if one == name] + further


@pytest.mark.parametrize("variant", BUNDLES)
def test_the_page_tells_every_tensor_of_a_bundle(variant: str, tiny_bundle: Callable[..., Path]) -> None:
    manifest = read_bundle(tiny_bundle(variant, **BUNDLES[variant])).manifest
    for graph, spec in manifest.graphs.items():
        for kind in ("inputs", "outputs"):
            for tensor in getattr(spec, kind):
                found = told(graph, kind, tensor)
                assert found, f"{tensor.name} among the {kind} of {graph}"
                ranks = {len(shape.split(",")) for shape, _ in found if shape}
                assert not ranks or len(tensor.shape) in ranks, (graph, tensor)
                dtypes = {dtype or "float32" for shape, dtype in found if shape}
                assert not dtypes or tensor.dtype in dtypes, (graph, tensor)


def test_what_the_page_names_is_in_the_code() -> None:
    code = "".join(
        path.read_text()
        for room in ("exporter", "graphs", "resprune")
        for path in (ROOT / room).rglob("*.py")
    )
    names = {name.split(".")[0] for name, _, _ in TENSOR.findall(" ".join([*GRAPHS.values(), OF_FAMILIES]))}
    names |= {given.strip("`").split(".")[0] for given, *_ in FURTHER}
    assert len(names) > 25
    assert [name for name in names if f'"{name}' not in code] == []


def test_its_python_runs() -> None:
    (program,) = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
