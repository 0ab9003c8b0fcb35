"""The decoder of a bundle in ONNX Runtime."""

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from resprune.elements import BY_ORT, FLOATS
from resprune.names import DECODER, STANDARD_INPUTS
from resprune.runtime.backends.backend import (
    Backend,
    Embedding,
    EmbedTokens,
    Place,
    closed_early,
    local_backend,
)
from resprune.runtime.backends.providers import cache_device
from resprune.runtime.backends.session import SessionOptions, graph_faults, open_session
from resprune.runtime.bundle.files import Bundle
from resprune.runtime.errors import ResPruneError
from resprune.runtime.prompt.splice import Array, Floats, Ints, Spliced

if TYPE_CHECKING:
    import onnxruntime

GRAPH = DECODER
CACHE_ROOM = 256
"""Tokens by which the cache of a decoder that writes in place is too long; when they are used up it is copied once."""
_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")


class OrtDecoder:
    """`decoder_model_merged` in ONNX Runtime: one session, shared by the sequences of all threads.

    A sequence's KV cache is a list of OrtValues: what one run binds as output (`present.*`) the next binds as input
    (`past_key_values.*`), on the device of the first provider, so Python neither copies it nor brings it to the
    host. On the CPU that costs the same as `session.run` with arrays, because ONNX Runtime 1.32 hands those over
    without a copy too: a random Llama (4 layers, width 256, fp32, one thread), CPU time of a step with
    `run` / `run_with_ort_values` / IOBinding / IOBinding into two preallocated buffers: 1.58 / 1.65 / 1.64 / 1.64 ms
    at 600 cached tokens, 6.46 / 6.67 / 6.58 / 6.19 ms at 4,000 (medians of 31 steps). What grows with the cache is
    the graph's own `Concat`. A decoder exported for ONNX Runtime (`in_place`) has none: it is given one buffer as past
    and as present, with room for more tokens, and writes behind the past.
    """

    def __init__(
        self, session: "onnxruntime.InferenceSession", embed_tokens: EmbedTokens, *, in_place: bool
    ) -> None:
        self.session: onnxruntime.InferenceSession | None = session
        self.embed_tokens = embed_tokens
        self.in_place = in_place
        self.device = cache_device(session)
        self._row_inputs: dict[str, tuple[Any, list[int]]] = {}
        self.past_names: list[str] = []
        self._empty: list[tuple[tuple[int, int, int], int]] = []  # shape without batch, and ONNX type
        self._empty_caches: dict[int, list[onnxruntime.OrtValue]] = {}
        for value in session.get_inputs():
            if _PAST.fullmatch(value.name):
                self.past_names.append(value.name)
                self._empty.append(_empty_cache(value))
            elif value.name not in STANDARD_INPUTS:
                dtype = np.dtype(BY_ORT[value.type].name)
                self._row_inputs[value.name] = (dtype, [int(size) for size in value.shape[2:]])
        self.present_names = [name.replace("past_key_values", "present", 1) for name in self.past_names]

    def start(self, spliced: Spliced) -> "OrtSequence":
        """Prefill (see `Decoder`)."""
        return OrtSequence(self, spliced)

    def close(self) -> None:
        """Give back the session; sequences that are still open raise when they step."""
        self.session = None

    def opened(self) -> "onnxruntime.InferenceSession":
        """The session; `ResPruneError` once it is closed."""
        if self.session is None:
            raise closed_early()
        return self.session

    def empty_cache(self, batch: int) -> "list[onnxruntime.OrtValue]":
        """A cache [B, heads, 0, width] of no tokens; nothing is ever written into it, so all sequences share it."""
        import onnxruntime as ort

        if batch not in self._empty_caches:
            self._empty_caches[batch] = [
                ort.OrtValue.ortvalue_from_shape_and_type((batch, *shape), element_type)
                for shape, element_type in self._empty
            ]
        return self._empty_caches[batch]

    def row_inputs(self, batch: int, length: int, given: dict[str, Array]) -> dict[str, Array]:
        """The graph's further inputs [B, S, …]: those given, zeros for the others."""
        return {
            name: given[name] if name in given else np.zeros((batch, length, *rest), dtype)
            for name, (dtype, rest) in self._row_inputs.items()
        }


class OrtSequence:
    """One batch of prompts and its KV cache (see `Sequence`)."""

    def __init__(self, decoder: OrtDecoder, spliced: Spliced) -> None:
        self._decoder = decoder
        self._place = Place.of(spliced)
        self._past = decoder.empty_cache(len(spliced.inputs_embeds))
        self._binding: onnxruntime.IOBinding | None = None
        self.logits = self._run(spliced.inputs_embeds, spliced.row_inputs)

    def step(self, tokens: Ints) -> None:
        """Append one token a row."""
        self._decoder.opened()
        self._place.step()
        self.logits = self._run(self._decoder.embed_tokens(tokens[:, None]), {})

    def close(self) -> None:
        """Free the cache."""
        self._past, self._binding = [], None

    def _run(self, inputs_embeds: Floats, row_inputs: dict[str, Array]) -> Floats:
        session = self._decoder.opened()
        in_place, place = self._decoder.in_place, self._place
        if in_place and self._past[0].shape()[2] < place.attention_mask.shape[1]:
            self._past, self._binding = [self._enlarged(value) for value in self._past], None
        binding = self._binding or self._bound(session)
        batch, length = inputs_embeds.shape[:2]
        further = self._decoder.row_inputs(batch, length, row_inputs)  # bound arrays must outlive the run
        for name, rows in further.items():
            binding.bind_cpu_input(name, rows)
        binding.bind_cpu_input("inputs_embeds", inputs_embeds)
        binding.bind_cpu_input("attention_mask", place.attention_mask)
        binding.bind_cpu_input("position_ids", place.position_ids)
        # Anew each time, or the next run writes over what this one returns.
        binding.bind_output("logits", "cpu")
        with graph_faults(GRAPH):
            session.run_with_iobinding(binding)
        if in_place:
            self._binding = binding
        else:
            self._past = binding.get_outputs()[1:]
        logits = binding.get_outputs_as_ortvaluevector()[0]
        last: Floats = logits.numpy()[:, -1]  # [B, 1, V], of older bundles [B, S, V] → [B, V]
        return last

    def _bound(self, session: "onnxruntime.InferenceSession") -> "onnxruntime.IOBinding":
        """A binding of the cache; a decoder that writes in place keeps it from step to step."""
        decoder = self._decoder
        binding = session.io_binding()
        for name, value in zip(decoder.past_names, self._past, strict=True):
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits", "cpu")  # the first of the outputs
        for name, value in zip(decoder.present_names, self._past, strict=True):
            if decoder.in_place:
                binding.bind_ortvalue_output(name, value)
            else:
                binding.bind_output(name, decoder.device)
        return binding

    def _enlarged(self, past: "onnxruntime.OrtValue") -> "onnxruntime.OrtValue":
        """A buffer with the past at its start and room for this run's tokens and CACHE_ROOM more."""
        import onnxruntime as ort

        kept = past.numpy()  # [B, heads, length, width]
        length = self._place.attention_mask.shape[1] + CACHE_ROOM
        room = np.zeros((*kept.shape[:2], length, kept.shape[3]), kept.dtype)
        room[:, :, : kept.shape[2]] = kept
        return ort.OrtValue.ortvalue_from_numpy(room, self._decoder.device)


def onnxruntime_decoder(bundle: Bundle, embed_tokens: EmbedTokens, options: SessionOptions) -> OrtDecoder:
    """The bundle's decoder, opened."""
    session = open_session(bundle, GRAPH, options)
    return OrtDecoder(session, embed_tokens, in_place=bundle.manifest.optimize == "ort")


def onnxruntime_backend(bundle: Bundle, embedding: Embedding, options: SessionOptions) -> Backend:
    """The bundle's own decoder in ONNX Runtime: what `Pipeline.load` uses unless it is given another."""
    return local_backend(bundle, onnxruntime_decoder(bundle, embedding, options))


def _empty_cache(value: Any) -> tuple[tuple[int, int, int], int]:
    """Shape without batch, and ONNX type, of a past input when it is empty."""
    _, heads, _, width = value.shape if len(value.shape) == 4 else (None,) * 4
    element = BY_ORT.get(value.type)
    if (
        not isinstance(heads, int)
        or not isinstance(width, int)
        or element is None
        or element.name not in FLOATS
    ):
        raise ResPruneError(
            f"{GRAPH}: {value.name} should have the shape [batch_size, heads, past_sequence_length, width] with fixed "
            f"heads and width, not {value.shape} of {value.type}; export the bundle again"
        )
    return (heads, 0, width), element.onnx
