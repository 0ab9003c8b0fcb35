"""A bundle's graphs as TensorRT engines on the GPU at hand, in either flavour of TensorRT, without PyTorch.

Device buffers are kept between runs and only grow. The decoder's cache never leaves the GPU: what one step writes as
`present.*` the next reads as `past_key_values.*`, from one of two sets of buffers that take turns.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from resprune.runtime.backends.backend import Generator, LocalGenerator
from resprune.runtime.backends.cuda import Buffer, Stream, download, gpu_at_hand, upload
from resprune.runtime.backends.engines import choose_engines, choose_profile, tensorrt_module
from resprune.runtime.backends.onnxruntime import Embedding
from resprune.runtime.backends.session import Array, SessionOptions
from resprune.runtime.bundle.files import Bundle
from resprune.runtime.bundle.manifest import EngineSpec, GraphSpec, TensorSpec, axis_names, axis_size
from resprune.runtime.errors import ResPruneError, one_line
from resprune.runtime.generate import eos_token_ids
from resprune.runtime.prompt.splice import Floats, Ints

Shape = tuple[int, ...]
# How much more than it needs the cache is given when it grows: it then grows a few times an answer, not every step.
CACHE_SPARE = 1.5
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "bool": 1}


@dataclass(frozen=True)
class OnDevice:
    """A tensor on the GPU."""

    address: int
    shape: Shape


class Engine:
    """One graph's engine, with a context for each of its optimisation profiles as they are needed."""

    def __init__(self, trt: Any, graph: str, spec: GraphSpec, engine: EngineSpec, path: Path) -> None:
        self._trt, self._graph, self._spec, self._engine_spec = trt, graph, spec, engine
        self._log = _log(trt)
        self._runtime = trt.Runtime(self._log)
        self._engine = self._made(self._runtime.deserialize_cuda_engine(path.read_bytes()))
        self._contexts: dict[int, Any] = {}

    def launch(
        self, inputs: Mapping[str, OnDevice], outputs: Mapping[str, Buffer], stream: Stream
    ) -> dict[str, OnDevice]:
        """Put one run on the stream; returns where its outputs will be.

        `inputs` has every input of the graph and `outputs` a buffer for every output, which is made large enough.
        Raises `ResPruneError` for sizes that no profile takes.
        """
        sizes = {
            axis: size
            for tensor in self._spec.inputs
            for axis, size in zip(tensor.shape, inputs[tensor.name].shape, strict=True)
            if isinstance(axis, str) and axis_names(axis) == [axis]
        }
        context = self._context(choose_profile(self._graph, self._engine_spec, sizes), stream)
        for name, tensor in inputs.items():
            self._must(context.set_input_shape(name, tensor.shape))
            self._must(context.set_tensor_address(name, tensor.address))
        made: dict[str, OnDevice] = {}
        for spec in self._spec.outputs:
            shape = tuple(context.get_tensor_shape(spec.name))
            address = outputs[spec.name].reserve(num_bytes(spec, shape))
            self._must(context.set_tensor_address(spec.name, address))
            made[spec.name] = OnDevice(address, shape)
        self._must(context.execute_async_v3(stream.handle))
        return made

    def _context(self, profile: int, stream: Stream) -> Any:
        if profile not in self._contexts:
            strategy = self._trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
            context = self._made(self._engine.create_execution_context(strategy))
            self._must(context.set_optimization_profile_async(profile, stream.handle))
            self._contexts[profile] = context
        return self._contexts[profile]

    def _made(self, thing: Any) -> Any:
        self._must(thing is not None)
        return thing

    def _must(self, went_well: bool) -> None:
        """TensorRT tells success by what it returns and the reason by its log."""
        if went_well:
            return
        reason = self._log.reason()
        if "memory" in reason.lower():
            raise ResPruneError(
                f"the GPU is out of memory for {self._graph} ({reason}); close other programs on it, or build engines "
                "with a smaller --batch, --prompt or --context"
            )
        raise ResPruneError(f"TensorRT could not run {self._graph} ({reason}); build its engine again")


class Engines:
    """The engines of a bundle for the GPU at hand: a `GraphRunner`, each opened when it is first needed."""

    def __init__(self, flavour: str, bundle: Bundle, options: SessionOptions) -> None:
        self._trt = tensorrt_module(flavour)
        self._bundle = bundle
        capability = gpu_at_hand().capability
        self._chosen = choose_engines(bundle, flavour, self._trt.__version__, capability)
        self._engines: dict[str, Engine] = {}
        self._buffers: dict[str, dict[str, Buffer]] = {}
        self._fed: list[Array] = []
        self.stream = Stream()

    def open(self, graph: str) -> None:
        """Load the engine of a graph; `ResPruneError` if the bundle has no such graph."""
        if graph not in self._engines:
            self._bundle.graph_path(graph)
            spec, engine = self._bundle.manifest.graphs[graph], self._chosen.graphs[graph]
            path = self._bundle.file_path(engine.file)
            self._engines[graph] = Engine(self._trt, graph, spec, engine, path)
            self._buffers[graph] = {tensor.name: Buffer() for tensor in (*spec.inputs, *spec.outputs)}

    def run(self, graph: str, feeds: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """The named outputs of one run on host arrays (see `GraphRunner`)."""
        self.open(graph)
        made = self.launch(graph, feeds, {}, self._buffers[graph])
        specs = {tensor.name: tensor for tensor in self._bundle.manifest.graphs[graph].outputs}
        arrays = [np.empty(made[name].shape, specs[name].dtype) for name in outputs]
        for name, array in zip(outputs, arrays, strict=True):
            download(made[name].address, array, self.stream)
        self.stream.synchronize()
        return arrays

    def launch(
        self,
        graph: str,
        feeds: Mapping[str, Array],
        on_device: Mapping[str, OnDevice],
        outputs: Mapping[str, Buffer],
    ) -> dict[str, OnDevice]:
        """Put a run on the stream: `feeds` from the host, `on_device` from where they are; returns its outputs.

        Outputs without a buffer in `outputs` go to the graph's own, which its next run overwrites. Wait for the stream
        before the next launch.
        """
        self.open(graph)
        own = self._buffers[graph]
        inputs = dict(on_device)
        self._fed = []  # arrays that the stream may still have to copy
        for tensor in self._bundle.manifest.graphs[graph].inputs:
            if tensor.name in feeds:
                array = np.ascontiguousarray(feeds[tensor.name], tensor.dtype)
                inputs[tensor.name] = OnDevice(own[tensor.name].reserve(array.nbytes), array.shape)
                upload(array, inputs[tensor.name].address, self.stream)
                self._fed.append(array)
        return self._engines[graph].launch(inputs, {**own, **outputs}, self.stream)

    def close(self) -> None:
        """Give back engines, buffers and stream."""
        self._engines.clear()
        for buffers in self._buffers.values():
            for buffer in buffers.values():
                buffer.close()
        self._buffers.clear()
        self.stream.close()


class TensorRTLanguageModel:
    """`decoder_model_merged` as an engine: a `LanguageModel` whose cache stays on the GPU."""

    def __init__(self, bundle: Bundle, embedding: Embedding, engines: Engines) -> None:
        self._spec = bundle.manifest.graphs["decoder_model_merged"]
        self._embedding = embedding
        self._engines = engines
        self._cache = [tensor for tensor in self._spec.inputs if tensor.name.startswith("past_key_values.")]
        self._buffers = [{_present(tensor): Buffer() for tensor in self._cache} for _ in range(2)]
        self._past: dict[str, OnDevice] = {}
        self._mask = np.zeros((0, 0), np.int64)
        self._position = np.zeros((0, 0), np.int64)
        engines.open("decoder_model_merged")

    def prefill(self, inputs_embeds: Floats, position_ids: Ints, attention_mask: Ints) -> Floats:
        """Logits [B, vocabulary] after the prompt (see `LanguageModel`)."""
        self._mask = attention_mask
        self._position = position_ids[..., -1:] + 1  # [B, 1] or [3, B, 1]
        # No past is no bytes, and TensorRT still wants an address.
        self._past = {
            tensor.name: OnDevice(
                self._buffers[0][_present(tensor)].reserve(1), _cache_shape(tensor, len(inputs_embeds), 0)
            )
            for tensor in self._cache
        }
        return self._run(inputs_embeds, position_ids)

    def step(self, tokens: Ints) -> Floats:
        """Logits [B, vocabulary] after one more token a row."""
        position_ids = self._position
        self._mask = np.concatenate([self._mask, np.ones((len(tokens), 1), np.int64)], axis=1)
        self._position = position_ids + 1
        return self._run(self._embedding(tokens[:, None]), position_ids)

    def close(self) -> None:
        """Give back the cache."""
        self._past = {}
        for buffers in self._buffers:
            for buffer in buffers.values():
                buffer.close()

    def _run(self, inputs_embeds: Floats, position_ids: Ints) -> Floats:
        feeds: dict[str, Array] = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": self._mask,
            "position_ids": position_ids,
        }
        read, write = self._buffers
        for tensor in self._cache:
            shape = _cache_shape(tensor, len(inputs_embeds), self._mask.shape[1])
            write[_present(tensor)].reserve(num_bytes(tensor, shape), CACHE_SPARE)
        made = self._engines.launch("decoder_model_merged", feeds, self._past, write)
        self._past = {tensor.name: made[_present(tensor)] for tensor in self._cache}
        self._buffers = [write, read]
        return self._last(made["logits"])

    def _last(self, logits: OnDevice) -> Floats:
        """The last position's row of each sequence: [B, 1, V] on the GPU, of older bundles [B, S, V] → [B, V]."""
        batch, length, vocabulary = logits.shape
        last = np.empty((batch, vocabulary), np.float32)
        for row in range(batch):
            start = ((row + 1) * length - 1) * vocabulary * last.itemsize
            download(logits.address + start, last[row], self._engines.stream)
        self._engines.stream.synchronize()
        return last


def tensorrt_generator(bundle: Bundle, embedding: Embedding, options: SessionOptions) -> Generator:
    """The bundle's own decoder as an engine: a `GeneratorFactory` for a pipeline whose graphs are `Engines`."""
    engines = embedding.graphs
    assert isinstance(engines, Engines)
    return LocalGenerator(TensorRTLanguageModel(bundle, embedding, engines), eos_token_ids(bundle))


def num_bytes(tensor: TensorSpec, shape: Shape) -> int:
    """What a tensor of this dtype and shape takes."""
    return math.prod(shape) * ITEM_BYTES[tensor.dtype]


def _cache_shape(tensor: TensorSpec, batch: int, length: int) -> Shape:
    sizes = {"batch_size": batch, "past_sequence_length": length}
    return tuple(axis_size(axis, sizes) for axis in tensor.shape)


def _present(past: TensorSpec) -> str:
    return past.name.replace("past_key_values", "present", 1)


def _log(trt: Any) -> Any:
    """TensorRT's log, which keeps the last error for the sentence that a failure becomes."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.error = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.error = message

        def reason(self) -> str:
            return one_line(self.error) or "it gives no reason"

    return Log()
