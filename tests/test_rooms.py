"""The rooms' one direction (evaluation → exporter → graphs, runtime; serving → runtime), read from every import."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from resprune import names

ROOT = Path(__file__).parent.parent
# room → what its files may never import
FORBIDDEN = {
    "runtime": (
        *(
            "torch",
            "torchvision",
            "transformers",
            "onnx",
            "onnxscript",
            "onnx_ir",
            "safetensors",
            "accelerate",
        ),
        *("huggingface_hub", "resprune.exporter", "resprune.evaluation", "resprune.graphs"),
        *("resprune.serving", "demo", "benchmarks", "tests"),
    ),
    "graphs": (
        *(
            "torch",
            "torchvision",
            "transformers",
            "resprune.exporter",
            "resprune.evaluation",
            "resprune.runtime",
        ),
        *("resprune.serving", "demo", "benchmarks", "tests"),
    ),
    "exporter": ("resprune.evaluation", "resprune.serving", "demo", "benchmarks", "tests"),
    "evaluation": ("resprune.graphs", "resprune.serving", "demo", "benchmarks", "tests"),
    "serving": (
        *(
            "torch",
            "torchvision",
            "transformers",
            "onnx",
            "onnxscript",
            "onnx_ir",
            "safetensors",
            "accelerate",
        ),
        *("huggingface_hub", "resprune.exporter", "resprune.evaluation", "resprune.graphs"),
        *("demo", "benchmarks", "tests"),
    ),
}
TENSORRT_LLM = (
    "runtime/backends/tensorrt_llm.py"  # TensorRT-LLM is made of torch: who has the one has the other
)
KERNELS = "kernels"  # in graphs: the one part that the runtime may import and that may import torch


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything a file imports, inside functions and TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def under(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def excepted(room: str, path: Path, name: str) -> bool:
    if path == ROOT / TENSORRT_LLM:
        return under(name, "torch")
    if room == "runtime":
        return under(name, f"resprune.graphs.{KERNELS}")
    return room == "graphs" and KERNELS in path.with_suffix("").parts and under(name, "torch")


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert len(files) > 1
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files
        for line, name in imports(path)
        for package in FORBIDDEN[room]
        if under(name, package) and not excepted(room, path, name)
    ]
    assert wrong == []


def test_what_all_rooms_share_imports_no_room() -> None:
    for module in ("method", "elements", "names"):
        assert [name for _, name in imports(ROOT / f"resprune/{module}.py") if "resprune" in name] == []


# The ops' functions name their own inputs; what the others write is JSON, with fields of its own.
OTHER_NAMES = (
    "graphs/functions.py",
    "graphs/kernels/compiled.py",
    "runtime/answer.py",
    "serving/model.py",
    "serving/completions.py",
)


def test_names_of_graphs_inputs_and_outputs_stand_once() -> None:
    known = {word for name, word in vars(names).items() if name.isupper() and isinstance(word, str)}
    assert len(known) > 20
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} has {node.value}"
        for room in FORBIDDEN
        for path in sorted((ROOT / room).rglob("*.py"))
        if str(path.relative_to(ROOT)) not in OTHER_NAMES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in known
    ]
    assert wrong == []


def test_what_tests_share_is_in_no_test_module() -> None:
    files = sorted((ROOT / "tests").rglob("*.py"))
    assert len(files) > 100
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files
        for line, name in imports(path)
        if under(name, "tests") and ".test_" in name
    ]
    assert wrong == []


def test_torch_is_imported_only_when_tensorrt_llm_is() -> None:
    """Not when the file is, which any device may do."""
    tree = ast.parse((ROOT / TENSORRT_LLM).read_text(encoding="utf-8"))
    at_once = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert at_once
    assert not [line for line in at_once if "torch" in line.split() or line.startswith("import tensorrt")]


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("import torch.nn as nn", "torch.nn"),
        ("def f():\n    from resprune.exporter.export import export", "resprune.exporter.export.export"),
        ("from resprune import exporter", "resprune.exporter"),
    ],
)
def test_the_reader_sees_every_form_of_import(tmp_path: Path, statement: str, found: str) -> None:
    path = tmp_path / "file.py"
    path.write_text(statement)
    assert [name for _, name in imports(path)] == [found]
