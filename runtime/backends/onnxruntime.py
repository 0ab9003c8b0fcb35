"""The language model behind a narrow seam: embeddings in, logits out, and nothing about pictures."""

import re
from typing import TYPE_CHECKING, Protocol

import numpy as np

from resprune.runtime.backends.providers import cache_device
from resprune.runtime.backends.session import GraphRunner, SessionOptions, graph_faults, open_session
from resprune.runtime.bundle.files import Bundle
from resprune.runtime.bundle.manifest import GraphSpec
from resprune.runtime.errors import ResPruneError
from resprune.runtime.prompt.splice import Floats, Ints

if TYPE_CHECKING:
    import onnxruntime

CACHE_ROOM = 256
"""Tokens by which the cache of a decoder that writes in place is too long; when they are used up it is copied once."""
_ELEMENT_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16}  # ONNX's numbers: NumPy has no bfloat16
_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")


class LanguageModel(Protocol):
    """A decoder with its KV cache. `prefill` starts a new sequence and forgets the one before."""

    def prefill(self, inputs_embeds: Floats, position_ids: Ints, attention_mask: Ints) -> Floats:
        """Logits [B, vocabulary] after the prompt.

        `inputs_embeds` [B, S, D]; `position_ids` [B, S], or [3, B, S] for M-RoPE; `attention_mask` [B, S] is 0 where
        a shorter prompt is filled up, on its left, and above 1 for a row that counts for more tokens than itself,
        which only a bundle of proportional attention knows.
        """
        ...

    def step(self, tokens: Ints) -> Floats:
        """Logits [B, vocabulary] after one more token a row, `tokens` [B]; positions count on by one."""
        ...

    def close(self) -> None:
        """Give back the cache and the sessions; the model cannot be used afterwards."""
        ...


class Embedding:
    """The language model's input table, as the bundle's `embed_tokens` graph."""

    def __init__(self, graphs: GraphRunner) -> None:
        self.graphs = graphs
        graphs.open("embed_tokens")

    def __call__(self, input_ids: Ints) -> Floats:
        """`input_ids` [B, S] → `inputs_embeds` [B, S, D] float32."""
        embeds: Floats
        (embeds,) = self.graphs.run("embed_tokens", {"input_ids": input_ids}, ["inputs_embeds"])
        return embeds


class OrtLanguageModel:
    """`decoder_model_merged` in ONNX Runtime.

    The KV cache is a list of OrtValues: what one run binds as output (`present.*`) the next binds as input
    (`past_key_values.*`), on the device of the first provider, so Python neither copies it nor brings it to the
    host. On the CPU that costs the same as `session.run` with arrays, because ONNX Runtime 1.32 hands those over
    without a copy too: a random Llama (4 layers, width 256, fp32, one thread), CPU time of a step with
    `run` / `run_with_ort_values` / IOBinding / IOBinding into two preallocated buffers: 1.58 / 1.65 / 1.64 / 1.64 ms
    at 600 cached tokens, 6.46 / 6.67 / 6.58 / 6.19 ms at 4,000 (medians of 31 steps). What grows with the cache is
    the graph's own `Concat`. A decoder exported for ONNX Runtime (`optimize`) has none: it is given one buffer as past
    and as present, with room for more tokens, and writes behind the past.
    """

    def __init__(self, bundle: Bundle, embedding: Embedding, options: SessionOptions) -> None:
        spec = bundle.manifest.graphs.get("decoder_model_merged")
        self._session = open_session(bundle, "decoder_model_merged", options)
        assert spec is not None  # open_session has refused a bundle without it
        self._embedding = embedding
        self._in_place = bundle.manifest.optimize == "ort"
        self._past_names, self._empty = _empty_cache(spec)
        self._present_names = [name.replace("past_key_values", "present", 1) for name in self._past_names]
        self._device = cache_device(self._session)
        self._past: list[onnxruntime.OrtValue] = []
        self._binding: onnxruntime.IOBinding | None = None
        self._mask = np.zeros((0, 0), np.int64)
        self._position = np.zeros((0, 0), np.int64)

    def prefill(self, inputs_embeds: Floats, position_ids: Ints, attention_mask: Ints) -> Floats:
        """Logits [B, vocabulary] after the prompt (see `LanguageModel`)."""
        import onnxruntime as ort

        self._past, self._binding = [], None  # the old cache goes before the new one is made
        batch = len(inputs_embeds)
        past = [
            ort.OrtValue.ortvalue_from_shape_and_type((batch, *shape), element_type)
            for shape, element_type in self._empty
        ]
        self._mask = attention_mask
        self._position = position_ids[..., -1:] + 1  # [B, 1] or [3, B, 1]
        return self._run(inputs_embeds, position_ids, past)

    def step(self, tokens: Ints) -> Floats:
        """Logits [B, vocabulary] after one more token a row."""
        position_ids = self._position
        self._mask = np.concatenate([self._mask, np.ones((len(tokens), 1), np.int64)], axis=1)
        self._position = position_ids + 1
        return self._run(self._embedding(tokens[:, None]), position_ids, self._past)

    def close(self) -> None:
        """Give back the cache and the session."""
        self._past, self._binding = [], None
        del self._session

    def _run(self, inputs_embeds: Floats, position_ids: Ints, past: "list[onnxruntime.OrtValue]") -> Floats:
        if self._in_place and past[0].shape()[2] < self._mask.shape[1]:
            past, self._binding = [self._enlarged(value) for value in past], None
        binding = self._binding or self._bound(past)
        binding.bind_cpu_input("inputs_embeds", inputs_embeds)
        binding.bind_cpu_input("attention_mask", self._mask)
        binding.bind_cpu_input("position_ids", position_ids)
        # Anew each time, or the next run writes over what this one returns.
        binding.bind_output("logits", "cpu")
        with graph_faults("decoder_model_merged"):
            self._session.run_with_iobinding(binding)
        if self._in_place:
            self._past, self._binding = past, binding
        else:
            self._past = binding.get_outputs()[1:]
        logits = binding.get_outputs_as_ortvaluevector()[0]
        last: Floats = logits.numpy()[:, -1]  # [B, 1, V], of older bundles [B, S, V] → [B, V]
        return last

    def _bound(self, past: "list[onnxruntime.OrtValue]") -> "onnxruntime.IOBinding":
        """A binding of the cache; a decoder that writes in place keeps it from step to step."""
        binding = self._session.io_binding()
        for name, value in zip(self._past_names, past, strict=True):
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits", "cpu")  # the first of the outputs
        for name, value in zip(self._present_names, past, strict=True):
            if self._in_place:
                binding.bind_ortvalue_output(name, value)
            else:
                binding.bind_output(name, self._device)
        return binding

    def _enlarged(self, past: "onnxruntime.OrtValue") -> "onnxruntime.OrtValue":
        """A buffer with the past at its start and room for this run's tokens and CACHE_ROOM more."""
        import onnxruntime as ort

        kept = past.numpy()  # [B, heads, length, width]
        room = np.zeros((*kept.shape[:2], self._mask.shape[1] + CACHE_ROOM, kept.shape[3]), kept.dtype)
        room[:, :, : kept.shape[2]] = kept
        return ort.OrtValue.ortvalue_from_numpy(room, self._device)


def _empty_cache(spec: GraphSpec) -> tuple[list[str], list[tuple[tuple[int, int, int], int]]]:
    """Names of the decoder's past inputs, and the shape (without batch) and ONNX type of each when empty."""
    names: list[str] = []
    empty: list[tuple[tuple[int, int, int], int]] = []
    for tensor in spec.inputs:
        if not _PAST.fullmatch(tensor.name):
            continue
        _, heads, _, width = tensor.shape if len(tensor.shape) == 4 else (None,) * 4
        if not isinstance(heads, int) or not isinstance(width, int):
            raise ResPruneError(
                f"{spec.file}: {tensor.name} should have the shape [batch_size, heads, past_sequence_length, "
                f"width] with fixed heads and width, not {list(tensor.shape)}; export the bundle again"
            )
        names.append(tensor.name)
        empty.append(((heads, 0, width), _ELEMENT_TYPES[tensor.dtype]))
    return names, empty
