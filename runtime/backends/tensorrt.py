"""A bundle's graphs as TensorRT engines on the GPU at hand, in either flavour of TensorRT, without PyTorch.

An engine is shared; whoever runs it has a `Lane` of its own: contexts, buffers that only grow, and a stream. A graph
that keeps nothing has one lane, whose users take turns; every sequence of the decoder has its own. Its cache never
leaves the GPU: what one step writes as `present.*` the next reads as `past_key_values.*`, from one of two sets of
buffers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, RLock
from typing import Any

import numpy as np

from resprune.elements import ELEMENTS
from resprune.names import DECODER, STANDARD_INPUTS
from resprune.runtime.backends.backend import (
    Backend,
    Embedding,
    EmbedTokens,
    Place,
    closed_early,
    local_backend,
)
from resprune.runtime.backends.cuda import Buffer, Stream, download, gpu_at_hand, upload
from resprune.runtime.backends.engines import choose_engines, choose_profile, tensorrt_module
from resprune.runtime.backends.session import Array, SessionOptions, already_closed
from resprune.runtime.bundle.files import Bundle
from resprune.runtime.bundle.manifest import EngineSpec, GraphSpec, TensorSpec, axis_names, axis_size
from resprune.runtime.errors import FailedError, ResPruneError, one_line
from resprune.runtime.prompt.splice import Floats, Ints, Spliced

Shape = tuple[int, ...]
# How much more than it needs the cache is given when it grows: it then grows a few times an answer, not every step.
CACHE_SPARE = 1.5


@dataclass(frozen=True)
class OnDevice:
    """A tensor on the GPU."""

    address: int
    shape: Shape


class Engine:
    """One graph's engine: the plan on the GPU, from which every lane makes its own contexts."""

    def __init__(self, trt: Any, graph: str, spec: GraphSpec, engine: EngineSpec, path: Path) -> None:
        self._trt, self._graph, self.spec, self._engine_spec = trt, graph, spec, engine
        self._log = _log(trt)
        self._runtime = trt.Runtime(self._log)
        self._engine = self._made(self._runtime.deserialize_cuda_engine(path.read_bytes()))

    def launch(
        self,
        contexts: dict[int, Any],
        inputs: Mapping[str, OnDevice],
        outputs: Mapping[str, Buffer],
        stream: Stream,
    ) -> dict[str, OnDevice]:
        """Put one run on the stream; returns where its outputs will be.

        `contexts` are the caller's own, one an optimisation profile, made as they are needed. `inputs` has every input
        of the graph and `outputs` a buffer for every output, which is made large enough. Raises `ResPruneError` for
        sizes that no profile takes.
        """
        sizes = {
            axis: size
            for tensor in self.spec.inputs
            for axis, size in zip(tensor.shape, inputs[tensor.name].shape, strict=True)
            if isinstance(axis, str) and axis_names(axis) == [axis]
        }
        profile = choose_profile(self._graph, self._engine_spec, sizes)
        if profile not in contexts:
            contexts[profile] = self._context(profile, stream)
        context = contexts[profile]
        for name, tensor in inputs.items():
            self._must(context.set_input_shape(name, tensor.shape))
            self._must(context.set_tensor_address(name, tensor.address))
        made: dict[str, OnDevice] = {}
        for spec in self.spec.outputs:
            shape = tuple(context.get_tensor_shape(spec.name))
            address = outputs[spec.name].reserve(num_bytes(spec, shape))
            self._must(context.set_tensor_address(spec.name, address))
            made[spec.name] = OnDevice(address, shape)
        self._must(context.execute_async_v3(stream.handle))
        return made

    def _context(self, profile: int, stream: Stream) -> Any:
        strategy = self._trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        context = self._made(self._engine.create_execution_context(strategy))
        self._must(context.set_optimization_profile_async(profile, stream.handle))
        return context

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
        raise FailedError(f"TensorRT could not run {self._graph} ({reason}); build its engine again")


class Lane:
    """What one user of an engine has for itself: contexts, buffers, and a stream."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._contexts: dict[int, Any] = {}
        tensors = (*engine.spec.inputs, *engine.spec.outputs)
        self._buffers = {tensor.name: Buffer() for tensor in tensors}
        self._fed: list[Array] = []
        self.stream = Stream()
        self.turn = Lock()
        """For who shares the lane with others."""

    def launch(
        self,
        feeds: Mapping[str, Array],
        on_device: Mapping[str, OnDevice],
        outputs: Mapping[str, Buffer],
    ) -> dict[str, OnDevice]:
        """Put a run on the stream: `feeds` from the host, `on_device` from where they are; returns its outputs.

        Outputs without a buffer in `outputs` go to the lane's own, which its next run overwrites. Wait for the stream
        before the next launch.
        """
        inputs = dict(on_device)
        self._fed = []  # arrays that the stream may still have to copy
        for tensor in self._engine.spec.inputs:
            if tensor.name in feeds:
                array = np.ascontiguousarray(feeds[tensor.name], tensor.dtype)
                inputs[tensor.name] = OnDevice(self._buffers[tensor.name].reserve(array.nbytes), array.shape)
                upload(array, inputs[tensor.name].address, self.stream)
                self._fed.append(array)
        return self._engine.launch(self._contexts, inputs, {**self._buffers, **outputs}, self.stream)

    def close(self) -> None:
        """Give back contexts, buffers and stream."""
        self._contexts.clear()
        for buffer in self._buffers.values():
            buffer.close()
        self.stream.close()


class Engines:
    """The engines of a bundle for the GPU at hand: a `GraphRunner`, each opened when it is first needed."""

    def __init__(self, flavour: str, bundle: Bundle, options: SessionOptions) -> None:
        self._trt = tensorrt_module(flavour)
        self._bundle = bundle
        capability = gpu_at_hand().capability
        self._chosen = choose_engines(bundle, flavour, self._trt.__version__, capability)
        self._engines: dict[str, Engine] = {}
        self._lanes: dict[str, Lane] = {}
        self._closed = False
        self._turn = RLock()

    def open(self, graph: str) -> None:
        """Load the engine of a graph; `ResPruneError` if the bundle has no such graph."""
        self.engine(graph)

    def engine(self, graph: str) -> Engine:
        """The engine of a graph, loaded."""
        with self._turn:
            if self._closed:
                raise already_closed()
            if graph not in self._engines:
                self._bundle.graph_path(graph)
                spec, engine = self._bundle.manifest.graphs[graph], self._chosen.graphs[graph]
                path = self._bundle.file_path(engine.file)
                self._engines[graph] = Engine(self._trt, graph, spec, engine, path)
            return self._engines[graph]

    def run(self, graph: str, feeds: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """The named outputs of one run on host arrays (see `GraphRunner`)."""
        with self._turn:
            lane = self._lanes.get(graph)
            if lane is None:
                lane = self._lanes[graph] = Lane(self.engine(graph))
        with lane.turn:
            if self._closed:  # since the lane was found
                raise already_closed()
            made = lane.launch(feeds, {}, {})
            specs = {tensor.name: tensor for tensor in self._bundle.manifest.graphs[graph].outputs}
            arrays = [np.empty(made[name].shape, specs[name].dtype) for name in outputs]
            for name, array in zip(outputs, arrays, strict=True):
                download(made[name].address, array, lane.stream)
            lane.stream.synchronize()
            return arrays

    def close(self) -> None:
        """Give back engines, buffers and streams; what is running ends first."""
        with self._turn:
            self._closed = True
            lanes = [*self._lanes.values()]
            self._lanes.clear()
            self._engines.clear()
        for lane in lanes:
            with lane.turn:
                lane.close()


class TensorRTDecoder:
    """`decoder_model_merged` as an engine: a `Decoder` whose sequences keep their caches on the GPU."""

    def __init__(self, bundle: Bundle, embed_tokens: EmbedTokens, engines: Engines) -> None:
        self.spec = bundle.graph(DECODER)
        self.embed_tokens = embed_tokens
        self._engine: Engine | None = engines.engine(DECODER)

    def start(self, spliced: Spliced) -> "TensorRTSequence":
        """Prefill (see `Decoder`)."""
        return TensorRTSequence(self, spliced)

    def close(self) -> None:
        """Give back the engine; sequences that are still open raise when they step."""
        self._engine = None

    def opened(self) -> Engine:
        """The engine; `ResPruneError` once it is closed."""
        if self._engine is None:
            raise closed_early()
        return self._engine


class TensorRTSequence:
    """One batch of prompts with contexts, stream and cache of its own (see `Sequence`)."""

    def __init__(self, decoder: TensorRTDecoder, spliced: Spliced) -> None:
        self._decoder = decoder
        self._lane: Lane | None = Lane(decoder.opened())
        inputs = decoder.spec.inputs
        self._cache = [tensor for tensor in inputs if tensor.name.startswith("past_key_values.")]
        self._further = [
            tensor for tensor in inputs if tensor.name not in STANDARD_INPUTS and tensor not in self._cache
        ]
        self._buffers = [{_present(tensor): Buffer() for tensor in self._cache} for _ in range(2)]
        self._place = Place.of(spliced)
        batch = len(spliced.inputs_embeds)
        # No past is no bytes, and TensorRT still wants an address.
        self._past = {
            tensor.name: OnDevice(
                self._buffers[0][_present(tensor)].reserve(1), _cache_shape(tensor, batch, 0)
            )
            for tensor in self._cache
        }
        try:
            self.logits = self._run(spliced.inputs_embeds, spliced.row_inputs)
        except BaseException:
            self.close()
            raise

    def step(self, tokens: Ints) -> None:
        """Append one token a row."""
        self._decoder.opened()
        self._place.step()
        self.logits = self._run(self._decoder.embed_tokens(tokens[:, None]), {})

    def close(self) -> None:
        """Give back contexts, stream and cache."""
        lane, self._lane = self._lane, None
        self._past = {}
        for buffers in self._buffers:
            for buffer in buffers.values():
                buffer.close()
        if lane is not None:
            lane.close()

    def __del__(self) -> None:
        """An answer that nobody holds any more frees its memory on the GPU."""
        if getattr(self, "_lane", None) is not None:
            self.close()

    def _run(self, inputs_embeds: Floats, row_inputs: Mapping[str, Array]) -> Floats:
        lane, place = self._lane, self._place
        assert lane is not None
        batch, length = inputs_embeds.shape[:2]
        feeds: dict[str, Array] = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": place.attention_mask,
            "position_ids": place.position_ids,
        }
        for tensor in self._further:
            rest = [int(size) for size in tensor.shape[2:]]
            zeros = np.zeros((batch, length, *rest), tensor.dtype)
            feeds[tensor.name] = row_inputs.get(tensor.name, zeros)
        read, write = self._buffers
        for tensor in self._cache:
            shape = _cache_shape(tensor, batch, place.attention_mask.shape[1])
            write[_present(tensor)].reserve(num_bytes(tensor, shape), CACHE_SPARE)
        made = lane.launch(feeds, self._past, write)
        self._past = {tensor.name: made[_present(tensor)] for tensor in self._cache}
        self._buffers = [write, read]
        return _last(made["logits"], lane.stream)


def _last(logits: OnDevice, stream: Stream) -> Floats:
    """The last position's row of each sequence: [B, 1, V] on the GPU, of older bundles [B, S, V] → [B, V]."""
    batch, length, vocabulary = logits.shape
    last = np.empty((batch, vocabulary), np.float32)
    for row in range(batch):
        start = ((row + 1) * length - 1) * vocabulary * last.itemsize
        download(logits.address + start, last[row], stream)
    stream.synchronize()
    return last


def tensorrt_backend(bundle: Bundle, embedding: Embedding, options: SessionOptions) -> Backend:
    """The bundle's own decoder as an engine: a `BackendFactory` for a pipeline whose graphs are `Engines`."""
    engines = embedding.graphs
    assert isinstance(engines, Engines)
    return local_backend(bundle, TensorRTDecoder(bundle, embedding, engines))


def num_bytes(tensor: TensorSpec, shape: Shape) -> int:
    """Bytes of a tensor of the dtype of `tensor` and this shape."""
    return math.prod(shape) * ELEMENTS[tensor.dtype].nbytes


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
