"""`tensorrt.plugin` without TensorRT's libraries: NVIDIA's own Python, over stand-ins for the C++ types it uses.

The package of bindings on PyPI (tensorrt-cu13-bindings) has the sources of `tensorrt.plugin`, and a compiled module
that needs libraries which PyPI does not have. The sources are loaded as they are: they check registrations, keep shape
expressions, and do what TensorRT's builder asks of a plugin. `tensorrt` itself is made here, of the names they use.
"""

import enum
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class DimensionOperation(enum.Enum):
    SUM = staticmethod(lambda a, b: a + b)
    PROD = staticmethod(lambda a, b: a * b)
    MAX = staticmethod(max)
    MIN = staticmethod(min)
    SUB = staticmethod(lambda a, b: a - b)
    FLOOR_DIV = staticmethod(lambda a, b: a // b)
    CEIL_DIV = staticmethod(lambda a, b: -(-a // b))


class IDimensionExpr:
    """An integer that may depend on dimensions of the inputs: `value` takes their values by name."""

    def __init__(self, value: Callable[[dict[str, int]], int], constant: bool) -> None:
        self.value, self._constant = value, constant

    def is_constant(self) -> bool:
        return self._constant

    def get_constant_value(self) -> int:
        assert self._constant
        return self.value({})


class IExprBuilder:
    def constant(self, value: int) -> IDimensionExpr:
        return IDimensionExpr(lambda _: value, True)

    def dimension(self, name: str) -> IDimensionExpr:
        return IDimensionExpr(lambda sizes: sizes[name], False)

    def operation(self, op: Any, a: IDimensionExpr, b: IDimensionExpr) -> IDimensionExpr:
        both = a.is_constant() and b.is_constant()
        return IDimensionExpr(lambda sizes: op(a.value(sizes), b.value(sizes)), both)


class Dims(tuple):
    MAX_DIMS = 8


class Logger:
    WARNING = 2

    def log(self, severity: int, message: str) -> None:
        """It says that `tensorrt.plugin` is experimental."""


class DimsExprs(list):
    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


class DataType(enum.Enum):
    FLOAT, HALF, BF16, INT32, INT64, BOOL, INT8 = range(7)


@dataclass
class PluginTensorDesc:
    dims: Dims = field(default_factory=Dims)
    type: Any = None
    format: Any = None
    scale: float = 1.0


@dataclass
class DynamicPluginTensorDesc:
    desc: PluginTensorDesc


@dataclass
class PluginField:
    name: str
    data: Any
    type: Any


class Registry:
    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        key = (creator.name, creator.plugin_version, namespace)
        assert key not in self.creators
        self.creators[key] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators[name, version, namespace]


def install() -> types.ModuleType:
    """Make `import tensorrt` and `import tensorrt.plugin` work in this process; returns the former."""
    trt: Any = types.ModuleType("tensorrt")
    trt.__path__ = []
    for stand_in in (
        *(DimensionOperation, IDimensionExpr, IExprBuilder, Dims, DimsExprs, DataType, PluginField),
        *(PluginTensorDesc, DynamicPluginTensorDesc, Logger),
    ):
        setattr(trt, stand_in.__name__, stand_in)
    for name in (
        *("IPluginV3", "IPluginV3QuickCore", "IPluginV3QuickBuild", "IPluginV3QuickAOTBuild", "ITensor"),
        *("IPluginV3QuickRuntime", "IPluginCreatorV3Quick", "ISymExpr"),
    ):
        setattr(trt, name, type(name, (), {}))
    trt.PluginFieldCollection = list
    trt.TensorFormat = enum.Enum("TensorFormat", "LINEAR HWC")
    trt.PluginFieldType = enum.Enum(
        "PluginFieldType", "INT8 INT16 INT32 INT64 FLOAT16 FLOAT32 FLOAT64 CHAR UNKNOWN"
    )
    trt.PluginArgType = enum.Enum("PluginArgType", "INT")
    trt.PluginArgDataType = enum.Enum("PluginArgDataType", "INT8 INT16 INT32")
    trt.TensorRTPhase = enum.Enum("TensorRTPhase", "BUILD RUNTIME")
    trt.QuickPluginCreationRequest = enum.Enum(
        "QuickPluginCreationRequest", "UNKNOWN PREFER_JIT PREFER_AOT STRICT_JIT STRICT_AOT"
    )
    trt.float32, trt.float16, trt.bfloat16 = DataType.FLOAT, DataType.HALF, DataType.BF16
    trt.int32, trt.int64, trt.bool = DataType.INT32, DataType.INT64, DataType.BOOL
    registry = Registry()
    trt.get_plugin_registry = lambda: registry
    sys.modules["tensorrt"] = trt

    bindings = importlib.util.find_spec(
        "tensorrt_bindings"
    )  # found, not run: its compiled module does not load
    assert bindings is not None
    assert bindings.origin is not None
    folder = Path(bindings.origin).parent / "plugin"
    spec = importlib.util.spec_from_file_location(
        "tensorrt.plugin", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    trt.plugin = importlib.util.module_from_spec(spec)
    sys.modules["tensorrt.plugin"] = trt.plugin
    spec.loader.exec_module(trt.plugin)
    return trt
