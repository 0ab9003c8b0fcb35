"""Graphs that are traced once a session: of its time tracing took the most, and most of what is traced has been."""

from __future__ import annotations

import gc
import hashlib
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

from resprune.exporter import export
from resprune.exporter.checkpoint.weightless import is_fake
from resprune.exporter.components import Component
from resprune.exporter.trace import ahead, tracer

Make = Callable[[str, Callable[[Path], Any]], Path]


@contextmanager
def kept(made_once: Make) -> Iterator[None]:
    """While it lasts, exports take a graph that was traced of a component like theirs in place of tracing it again.

    Each is compared with PyTorch all the same. A test that changes what the tracer calls, not what it is given, keeps
    its graphs under other names, or sets `ahead.trace` back to `tracer.trace`.
    """

    def trace(component: Component, whole: nn.Module, mode: FakeTensorMode) -> tracer.Traced:
        def write(path: Path) -> None:
            gc.disable()  # it makes millions of objects that stay until it ends
            try:
                path.write_bytes(pickle.dumps(tracer.trace(component, whole, mode)))
            finally:
                gc.enable()

        path = made_once(f"traced-{fingerprint(component, whole)}", write)
        traced: tracer.Traced = pickle.loads(path.read_bytes())
        return traced

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead, "trace", trace)
        patch.setattr(export, "traced_ahead", _in_turn)
        yield


@contextmanager
def _in_turn(
    components: Sequence[Component], whole: nn.Module, mode: FakeTensorMode
) -> Iterator[Iterator[tracer.Traced]]:
    """As `ahead.traced_ahead`, in this process: to fork what the tests hold takes longer than to read a graph.

    All are traced before anybody builds a model, which must not happen beside it.
    """
    yield iter([ahead.trace(component, whole, mode) for component in components])


def fingerprint(component: Component, whole: nn.Module) -> str:
    """Of all that the tracer is given: modules and what they hold, inputs, outputs and functions, not the weights."""
    example = component.samples(tracer.SIZES, torch.Generator())
    facts = (component.name, component.module, component.inputs, component.outputs, component.layers)
    shapes = [(tensor.shape, tensor.dtype) for tensor in example]
    seen = _Seen({id(tensor): name for name, tensor in whole.named_parameters(remove_duplicate=False)})
    text = "\n".join(seen.words((facts, shapes, component.functions)))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@dataclass
class _Seen:
    """`names` are the parameters' by id; `numbers` count the objects met, which are kept alive for their ids."""

    names: Mapping[int, str]
    numbers: dict[int, tuple[int, object]] = field(default_factory=dict)

    def words(self, value: Any) -> Iterator[str]:
        """What a value is, whatever process it is in."""
        if value is None or isinstance(value, bool | int | float | str | bytes | torch.dtype | type):
            yield repr(value)
        elif id(value) in self.numbers:
            yield f"as {self.numbers[id(value)][0]}"
        else:
            self.numbers[id(value)] = len(self.numbers), value
            yield type(value).__qualname__
            for part in self._parts(value):
                yield from self.words(part)

    def _parts(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            known = self.names.get(id(value)) if is_fake(value) else value.tolist()
            return [str(known), str(value.shape), value.dtype]
        if isinstance(value, PreTrainedConfig):
            return [value.to_json_string(use_diff=False), str(value._attn_implementation)]
        if isinstance(value, ir.Function):
            return [ir.to_proto(value).SerializeToString(deterministic=True)]
        if isinstance(value, FunctionType):
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            return [value.__module__, value.__qualname__, value.__code__, value.__defaults__, cells]
        if isinstance(value, CodeType):  # with the functions inside it, which are among its constants
            return [value.co_code, value.co_consts, value.co_names]
        if isinstance(value, MethodType):
            return [value.__func__, value.__self__]
        if isinstance(value, Mapping):
            return [*value.items()]
        if isinstance(value, list | tuple):
            return value
        if isinstance(value, set | frozenset):
            return sorted(map(repr, value))
        if isinstance(value, nn.Module) or is_dataclass(value):
            # The keys of hooks count all that the process has made.
            facts = {
                name: [*held.values()] if name.endswith("_hooks") else held
                for name, held in vars(value).items()
            }
            return [type(value).__module__, facts]
        return [repr(value)]
