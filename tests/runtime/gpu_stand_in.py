"""A stand-in for a GPU and its TensorRT, so that all but these two can be judged on a CPU.

Device memory is host memory, handed out full of NaNs and watched at its ends; what is put on a stream runs when that is
waited for, and not before; an "engine" is the path of its graph, which ONNX Runtime runs on what then lies at the
addresses it was told. Its objects have the methods of the real ones, whose
presence `tests/runtime/test_tensorrt.py` checks, and none besides. It says nothing about TensorRT itself.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import pytest

from resprune.exporter.tensorrt.limits import Limits
from resprune.exporter.tensorrt.profiles import profiles
from resprune.runtime.backends.engines import graph_sources, set_name, target_name
from resprune.runtime.backends.session import SessionOptions, open_session
from resprune.runtime.bundle.files import Bundle, describe_file, read_bundle, write_manifest
from resprune.runtime.bundle.manifest import EngineSet, EngineSpec, axis_names, axis_size

FLAVOUR, VERSION = "tensorrt-rtx", "0.0.stand-in"
GUARD = 64


class Status(IntEnum):
    cudaSuccess = 0  # noqa: N815
    cudaErrorMemoryAllocation = 2  # noqa: N815
    cudaErrorInvalidValue = 1  # noqa: N815


class CopyKind(IntEnum):
    cudaMemcpyHostToDevice = 1  # noqa: N815
    cudaMemcpyDeviceToHost = 2  # noqa: N815


@dataclass
class Properties:
    name: bytes = b"Stand-in"
    major: int = 8
    minor: int = 6
    multiProcessorCount: int = 84  # noqa: N815 - CUDA names it so


@dataclass
class Cuda:
    """`cuda.bindings.runtime`, as far as runtime/backends/cuda.py calls it."""

    limit: int = 1 << 30
    gpus: int = 1
    properties: Properties = field(default_factory=Properties)
    blocks: dict[int, np.ndarray[Any, Any]] = field(default_factory=dict)
    allocations: int = 0
    streams: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    streams_made: int = 0
    turn: Any = field(default_factory=RLock)
    cudaMemcpyKind = CopyKind  # noqa: N815

    def cudaGetDeviceCount(self) -> tuple[Status, int]:  # noqa: N802
        return Status.cudaSuccess, self.gpus

    def cudaGetDeviceProperties(self, device: int) -> tuple[Status, Properties]:  # noqa: N802
        return Status.cudaSuccess, self.properties

    def cudaDriverGetVersion(self) -> tuple[Status, int]:  # noqa: N802
        return Status.cudaSuccess, 13000

    def cudaStreamCreate(self) -> tuple[Status, int]:  # noqa: N802
        with self.turn:
            self.streams_made += 1
            self.streams[self.streams_made] = []
            return Status.cudaSuccess, self.streams_made

    def cudaStreamSynchronize(self, stream: int) -> tuple[Status]:  # noqa: N802
        waiting = self.streams[stream]
        while waiting:
            waiting.pop(0)()
        return (Status.cudaSuccess,)

    def cudaStreamDestroy(self, stream: int) -> tuple[Status]:  # noqa: N802
        del self.streams[stream]
        return (Status.cudaSuccess,)

    def cudaMalloc(self, size: int) -> tuple[Status, int]:  # noqa: N802
        with self.turn:
            if self.in_use() + size > self.limit:
                return Status.cudaErrorMemoryAllocation, 0
            self.allocations += 1
            block = np.full(
                size + 2 * GUARD, 0xFF, np.uint8
            )  # NaN in every float, a wild index in every integer
            address = block.ctypes.data + GUARD
            self.blocks[address] = block
            return Status.cudaSuccess, address

    def cudaFree(self, address: int) -> tuple[Status]:  # noqa: N802
        with self.turn:
            block = self.blocks.pop(address)
        assert (block[:GUARD] == 0xFF).all()
        assert (block[-GUARD:] == 0xFF).all(), "written past the end"
        return (Status.cudaSuccess,)

    def cudaMemcpyAsync(self, to: int, from_: int, size: int, kind: CopyKind, stream: int) -> tuple[Status]:  # noqa: N802
        def copy() -> None:
            self.check(to if kind is CopyKind.cudaMemcpyHostToDevice else from_, size)
            ctypes.memmove(to, from_, size)

        self.streams[stream].append(copy)
        return (Status.cudaSuccess,)

    def in_use(self) -> int:
        return sum(len(block) - 2 * GUARD for block in self.blocks.values())

    def check(self, address: int, size: int) -> None:
        """The range must lie in one block that has not been freed."""
        with self.turn:
            inside = any(
                start <= address and address + size <= start + len(block) - 2 * GUARD
                for start, block in self.blocks.items()
            )
        assert inside, f"{size} bytes at {address:#x} are not allocated"


class Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1


class ILogger:
    Severity = Severity

    def __init__(self) -> None:
        pass


class ExecutionContextAllocationStrategy(IntEnum):
    ON_PROFILE_CHANGE = 1


class IExecutionContext:
    """It stays on the stream of its profile: what one stream still runs, another must not set up anew."""

    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._profile = self._stream = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream in self._engine.cuda.streams
        self._profile, self._stream = index, stream
        return 0 <= index < 2

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address, f"{name} has no address"
        self._addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        inputs, outputs = self._engine.spec.inputs, self._engine.spec.outputs
        sizes = {
            axis: size
            for spec in inputs
            for axis, size in zip(spec.shape, self._shapes[spec.name], strict=True)
            if isinstance(axis, str)
        }
        (spec,) = (spec for spec in outputs if spec.name == name)
        if all(each in sizes for axis in spec.shape for each in axis_names(axis)):
            return tuple(axis_size(axis, sizes) for axis in spec.shape)
        blank = {spec.name: np.zeros(self._shapes[spec.name], spec.dtype) for spec in inputs}
        (made,) = self._engine.session.run([name], blank)
        return tuple(made.shape)

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == self._stream, "a context that two streams run"
        run = partial(self._engine._run, dict(self._shapes), dict(self._addresses))
        self._engine.cuda.streams[stream].append(run)
        self._engine.runs.append((self._engine.graph, self._profile))
        return True


class ICudaEngine:
    def __init__(self, bundle: Bundle, graph: str, cuda: Cuda, runs: list[tuple[str, int]]) -> None:
        self.graph, self.cuda, self.runs = graph, cuda, runs
        self.spec = bundle.manifest.graphs[graph]
        self.session = open_session(bundle, graph, SessionOptions(threads=1))

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        feeds = {}
        for spec in self.spec.inputs:
            array = np.empty(shapes[spec.name], spec.dtype)
            self.cuda.check(addresses[spec.name], array.nbytes)
            ctypes.memmove(array.ctypes.data, addresses[spec.name], array.nbytes)
            feeds[spec.name] = array
        names = [spec.name for spec in self.spec.outputs]
        for name, array in zip(names, self.session.run(names, feeds), strict=True):
            made = np.ascontiguousarray(array)
            self.cuda.check(addresses[name], made.nbytes)
            ctypes.memmove(addresses[name], made.ctypes.data, made.nbytes)

    def create_execution_context(self, strategy: ExecutionContextAllocationStrategy) -> IExecutionContext:
        assert strategy is ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        return IExecutionContext(self)


class TensorRT:
    """The module `tensorrt_rtx`."""

    __version__ = VERSION
    ILogger = ILogger
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.runs: list[tuple[str, int]] = []
        self.fails = ""

    def Runtime(self, logger: Any) -> Runtime:  # noqa: N802
        return Runtime(self, logger)


@dataclass
class Runtime:
    trt: TensorRT
    logger: Any

    def deserialize_cuda_engine(self, serialised: bytes) -> ICudaEngine | None:
        if self.trt.fails:
            self.logger.log(Severity.ERROR, self.trt.fails)
            return None
        root, graph = serialised.decode().split("\n")
        return ICudaEngine(read_bundle(root, check_hashes=False), graph, self.trt.cuda, self.trt.runs)


def with_engines(root: Path, limits: Limits | None = None) -> Bundle:
    """Lists engines of every graph in the bundle's manifest, as `resprune build` does, for the stand-in to run."""
    bundle = read_bundle(root)
    target = target_name((8, 6))
    folder = f"engines/{set_name(FLAVOUR, target)}"
    (root / folder).mkdir(parents=True)
    engines, files = {}, dict(bundle.manifest.files)
    for graph, ranges in profiles(bundle, limits or Limits()).items():
        file = f"{folder}/{graph}.engine"
        (root / file).write_text(f"{root}\n{graph}")
        files[file] = describe_file(root, file)
        engines[graph] = EngineSpec(file, graph_sources(bundle, graph), {FLAVOUR: VERSION}, ranges)
    manifest = replace(
        bundle.manifest,
        files=files,
        engines={set_name(FLAVOUR, target): EngineSet(FLAVOUR, target, engines)},
    )
    write_manifest(root, manifest)
    return read_bundle(root)


@dataclass
class Place:
    """Where engines run: their flavour, and how they come into a bundle."""

    flavour: str
    equip: Callable[[Path], Any]
    atol: float
    cuda: Cuda | None = None
    trt: TensorRT | None = None


def stand_in_for(monkeypatch: pytest.MonkeyPatch) -> Place:
    """From now on the runtime finds a GPU, this one."""
    cuda = Cuda()
    trt = TensorRT(cuda)
    monkeypatch.setattr("resprune.runtime.backends.cuda._runtime", lambda: cuda)
    monkeypatch.setattr("resprune.runtime.backends.tensorrt.tensorrt_module", lambda flavour: trt)
    return Place(FLAVOUR, with_engines, 1e-5, cuda, trt)
