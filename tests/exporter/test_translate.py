"""One trace is enough for what the families are made of, and where it is not there is a second."""

import importlib.util
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnxscript.rewriter import RewriteRule
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.onnx._internal.exporter import _decomp
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.onnx._internal.fx.passes import type_promotion

from resprune.exporter.checkpoint.checkpoint import resolve
from resprune.exporter.checkpoint.weightless import fake_mode
from resprune.exporter.families import split_model
from resprune.exporter.trace import tracer, translate
from resprune.exporter.trace.shortcuts import shortcuts
from resprune.exporter.trace.tracer import OPSET, trace


@pytest.fixture
def traced_again(monkeypatch: pytest.MonkeyPatch) -> list[ExportedProgram]:
    """The programs that torch.onnx traces a second time."""
    programs: list[ExportedProgram] = []
    own = ExportedProgram.run_decompositions

    def decompose(program: ExportedProgram, table: object = None) -> ExportedProgram:
        programs.append(program)
        return own(program, table)  # type: ignore[arg-type]

    monkeypatch.setattr(ExportedProgram, "run_decompositions", decompose)
    return programs


@pytest.mark.parametrize(("variant", "part"), [("clip-llama", "decoder"), ("gemma3", "vision")])
def test_the_graph_is_that_of_tracing_twice(
    variant: str,
    part: str,
    traced_again: list[ExportedProgram],
    tiny_checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint, mode = resolve(str(tiny_checkpoint(variant))), fake_mode()
    components = split_model(checkpoint, torch.float16, mode)
    once = trace(getattr(components, part), components.model, mode)
    assert traced_again == []
    monkeypatch.setattr(tracer, "translate", translate._export)
    monkeypatch.setattr(tracer, "shortcuts", nullcontext)  # as of a torch that has them elsewhere
    twice = trace(getattr(components, part), components.model, mode)
    assert len(traced_again) == 1
    assert once.weights == twice.weights
    operators, wanted = (Counter(node.op_type for node in one.model.graph.node) for one in (once, twice))
    assert operators == wanted


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (_decomp, "create_onnx_friendly_decomposition_table"),
        (ONNXRegistry, "from_torchlib"),
        (RewriteRule, "try_rewrite"),
        (type_promotion, "_TypePromotionInterpreter"),
    ],
)
def test_without_a_private_name_exports_go_on(
    owner: object, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(owner, name)
    monkeypatch.delitem(sys.modules, shortcuts.__module__)
    spec = importlib.util.spec_from_file_location("tracer_of_another_torch", tracer.__file__)
    assert spec is not None
    assert spec.loader is not None
    anew = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, anew)  # dataclasses look for it there
    spec.loader.exec_module(anew)
    assert anew.shortcuts is nullcontext


class Mixed(nn.Module):
    def forward(self, values: Tensor, counts: Tensor) -> Tensor:
        halves = values.half()
        shares = counts / counts.sum()
        added = torch.where(counts > 1, values + halves, shares * counts) + counts.sqrt()
        return (added, halves * counts + counts.size(0))[1] * added.double()


def test_casts_are_those_of_running_the_program_again(monkeypatch: pytest.MonkeyPatch) -> None:
    example = torch.tensor([0.25, 2.0, 0.5]), torch.tensor([1, 4, 9])
    axes = ({0: torch.export.Dim.DYNAMIC}, {0: torch.export.Dim.DYNAMIC})

    def write() -> bytes:
        program = torch.export.export(Mixed(), example, dynamic_shapes=axes)
        names = {"input_names": ["values", "counts"], "output_names": ["found"]}
        model = translate.translate(program, **names, opset_version=OPSET)
        ClearMetadataAndDocStringPass()(model.model)
        return ir.to_proto(model.model).SerializeToString(deterministic=True)

    runs: list[object] = []
    own = fx.Interpreter.run_node
    monkeypatch.setattr(fx.Interpreter, "run_node", lambda self, n: runs.append(n.target) or own(self, n))
    with shortcuts():
        known = write()
    assert torch.ops.aten.sum.default not in runs
    assert known == write()
    assert torch.ops.aten.sum.default in runs
    session = onnxruntime.InferenceSession(known, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"values": example[0].numpy(), "counts": example[1].numpy()})
    torch.testing.assert_close(torch.from_numpy(found), Mixed()(*example))


class InPlace(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        changed = values * 2
        kept = changed + 0
        changed.add_(1)
        return changed - kept


class CopyInPlace(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        copy = values.to(torch.float32, copy=True)
        copy.add_(1)
        return copy - values


class Counted(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return torch.count_nonzero(values, 1)


@pytest.mark.parametrize("module", [InPlace(), CopyInPlace(), Counted()])
def test_what_needs_a_second_trace_gets_it(module: nn.Module, traced_again: list[ExportedProgram]) -> None:
    values = torch.tensor([[0.0, 2.0, 0.5], [1.0, 0.0, 0.0]])
    program = torch.export.export(module, (values,))
    model = translate.translate(program, input_names=["values"], output_names=["found"], opset_version=OPSET)
    assert len(traced_again) == 1
    session = onnxruntime.InferenceSession(
        ir.to_proto(model.model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"values": values.numpy()})
    assert torch.equal(torch.from_numpy(found), module(values))
