"""What of TensorRT-LLM the runtime calls, with its signatures, in front of a checkpoint in PyTorch.

Copied from TensorRT-LLM 1.2: the names and order of arguments of `LLM.generate_async`, `SamplingParams`,
`ModelRunnerCpp.from_dir`, `ModelRunnerCpp.generate` and `MropeParams`, what they accept, and what they return. Tokens
come from the Hugging Face model, so that a prompt that is put together wrongly gives another answer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.runtime.wire import Model

ACCEPTED = (
    *("num_beams", "top_k", "top_p", "top_p_min", "top_p_reset_ids", "top_p_decay", "temperature", "min_tokens"),
    *("beam_search_diversity_rate", "repetition_penalty", "presence_penalty", "frequency_penalty", "length_penalty"),
    *("early_stopping", "no_repeat_ngram_size", "random_seed", "num_return_sequences", "min_p", "beam_width_array"),
)  # fmt: skip
VOCAB_SIZE = 5000  # the engine's, larger than any id of a checkpoint here
MAX_SEQ_LEN = 512


def install(monkeypatch: pytest.MonkeyPatch, model: Model, **limits: int) -> Recorded:
    """Make `import tensorrt_llm` find this for the length of a test."""
    recorded = Recorded(model, **limits)
    package, layers, runtime = (
        ModuleType(name) for name in ("tensorrt_llm", "tensorrt_llm.layers", "tensorrt_llm.runtime")
    )
    vars(package).update(
        LLM=lambda **given: LLM(recorded, **given),
        SamplingParams=SamplingParams,
        layers=layers,
        runtime=runtime,
    )
    vars(layers).update(MropeParams=MropeParams)
    vars(runtime).update(
        ModelRunnerCpp=SimpleNamespace(from_dir=lambda **given: ModelRunnerCpp.from_dir(recorded, **given))
    )
    for module in (package, layers, runtime):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return recorded


@dataclass
class Recorded:
    """The checkpoint, and what was asked of it."""

    model: Model
    table_size: int = 64
    opened: str = ""
    prompts: tuple[Any, ...] = ()
    sampling: Any = None
    aborted: int = 0
    cancelled: tuple[int, ...] = ()
    shut_down: bool = False


@dataclass
class SamplingParams:
    """The fields that matter here, in the order of sampling_params.py; another one is a TypeError."""

    end_id: int | None = None
    pad_id: int | None = None
    max_tokens: int = 32
    stop_token_ids: list[int] | None = None
    n: int = 1
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    temperature: float | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    min_p: float | None = None
    detokenize: bool = True

    @property
    def greedy(self) -> bool:
        return self.top_k in (None, 1) and self.top_p in (None, 0.0)


class LLM:
    """llmapi/llm.py, for a model of the PyTorch backend."""

    def __init__(self, recorded: Recorded, model: str, tokenizer: Any = None) -> None:
        recorded.opened = model
        self.recorded = recorded

    def generate_async(
        self,
        inputs: dict[str, Any],
        sampling_params: SamplingParams | None = None,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        streaming: bool = False,
    ) -> Result:
        assert set(inputs) == {"prompt", "multi_modal_embeddings"}
        assert isinstance(sampling_params, SamplingParams)
        assert streaming
        self.recorded.prompts += (inputs["prompt"],)
        self.recorded.sampling = sampling_params
        (images,) = inputs["multi_modal_embeddings"].values()
        assert isinstance(images, list), "a bare tensor fails"
        assert all(isinstance(image, Tensor) and image.dim() == 2 for image in images)
        # LlavaNextInputProcessor.attach_multimodal_embeddings: the tokenizer as it is, ids from vocab_size on.
        model, counts = self.recorded.model, iter(map(len, images))
        ids = model.tokenizer(inputs["prompt"], return_tensors="pt").input_ids[0].tolist()
        ids = [t for id_ in ids for t in [id_] * (next(counts) if id_ == model.image_token_id else 1)]
        settings = {
            "max_tokens": sampling_params.max_tokens,
            "temperature": 0 if sampling_params.greedy else sampling_params.temperature,
            "seed": sampling_params.seed,
        }
        stops = {sampling_params.end_id, *(sampling_params.stop_token_ids or [])}
        return Result(
            self.recorded,
            model.generate(ids, torch.cat(images), torch.arange(len(ids))[None], settings),
            stops,
        )

    def shutdown(self) -> None:
        self.recorded.shut_down = True


class Result:
    """executor/result.py: an iterator over itself, `outputs[0].token_ids` with all tokens so far."""

    def __init__(self, recorded: Recorded, tokens: Iterator[int], stops: set[int | None]) -> None:
        self.recorded, self.tokens, self.stops = recorded, tokens, stops
        self.outputs = [SimpleNamespace(token_ids=[])]
        self.finished = False

    def __iter__(self) -> Iterator[Result]:
        for token in self.tokens:
            self.outputs[0].token_ids.append(token)
            yield self
            if token in self.stops:
                break
        self.finished = True

    def abort(self) -> None:
        self.recorded.aborted += 1


class MropeParams:
    """layers/attention.py."""

    def __init__(
        self, mrope_rotary_cos_sin: Tensor | None = None, mrope_position_deltas: Tensor | None = None
    ) -> None:
        self.mrope_rotary_cos_sin = mrope_rotary_cos_sin
        self.mrope_position_deltas = mrope_position_deltas


class ModelRunnerCpp:
    """runtime/model_runner_cpp.py."""

    def __init__(self, recorded: Recorded) -> None:
        self.recorded = recorded
        self.vocab_size = VOCAB_SIZE
        self.max_prompt_embedding_table_size = recorded.table_size
        self.session = SimpleNamespace(cancel_request=self._cancel)

    def _cancel(self, id: int) -> None:
        self.recorded.cancelled += (id,)

    @classmethod
    def from_dir(
        cls,
        recorded: Recorded,
        engine_dir: str,
        *,
        max_batch_size: int | None = None,
        max_input_len: int | None = None,
        max_output_len: int | None = None,
    ) -> ModelRunnerCpp:
        recorded.opened = engine_dir
        return cls(recorded)

    def generate(
        self,
        batch_input_ids: list[Tensor],
        *,
        position_ids: list[Tensor] | None = None,
        mrope_params: MropeParams | None = None,
        sampling_config: Any = None,
        streaming: bool = False,
        max_new_tokens: int = 1,
        end_id: int | None = None,
        pad_id: int | None = None,
        bad_words_list: list[list[list[int]]] | None = None,
        stop_words_list: list[list[list[int]]] | None = None,
        return_dict: bool = False,
        output_sequence_lengths: bool = False,
        prompt_table: str | Tensor | None = None,
        prompt_tasks: str | None = None,
        **kwargs: Any,
    ) -> Iterator[dict[str, Tensor]]:
        assert set(kwargs) <= set(ACCEPTED)
        assert streaming
        assert return_dict
        assert output_sequence_lengths
        assert isinstance(prompt_table, Tensor)
        assert isinstance(prompt_tasks, str)
        assert all(ids.dtype == torch.int32 and ids.dim() == 1 for ids in batch_input_ids)
        assert stop_words_list is not None
        assert len(stop_words_list) == len(batch_input_ids)
        self.recorded.sampling = kwargs
        tasks = [int(task) for task in prompt_tasks.split(",")]
        assert len(tasks) == len(batch_input_ids)
        streams = []
        for row, (ids, task) in enumerate(zip(batch_input_ids, tasks, strict=True)):
            settings = {
                "max_tokens": max_new_tokens,
                "temperature": 0 if kwargs.get("top_k") == 1 else kwargs["temperature"],
                "seed": kwargs.get("random_seed"),
            }
            streams.append(self._tokens(ids, prompt_table[task], mrope_params, row, settings))
        numbers = list(range(7, 7 + len(streams)))
        return self._stream([ids.tolist() for ids in batch_input_ids], streams, end_id, request_ids=numbers)

    def _tokens(
        self, ids: Tensor, table: Tensor, mrope: MropeParams | None, row: int, settings: dict[str, Any]
    ) -> Iterator[int]:
        model = self.recorded.model
        visual = ids >= VOCAB_SIZE
        rows = table[ids[visual].long() - VOCAB_SIZE]
        known = torch.where(visual, model.image_token_id, ids).tolist()
        places = torch.arange(len(known))[None]
        if mrope is None:
            yield from model.generate(known, rows, places, settings)
            return
        with turned(model, mrope, row, len(known)):  # the whole answer: rows take turns, and share the model
            tokens = list(model.generate(known, rows, places.expand(3, 1, -1), settings))
        yield from tokens

    @staticmethod
    def _stream(
        prompts: list[list[int]], streams: list[Iterator[int]], end_id: int | None, *, request_ids: list[int]
    ) -> Iterator[dict[str, Tensor]]:
        """Rows begin with the prompt, which streaming does not leave out, and are filled up with `end_id`."""
        written = [list(prompt) for prompt in prompts]
        running = set(range(len(prompts)))
        while running:
            for row in sorted(running):
                token = next(streams[row], None)
                if token is None:
                    running.discard(row)
                else:
                    written[row].append(token)
            yield {
                "output_ids": torch.tensor([[row + [end_id] * (MAX_SEQ_LEN - len(row))] for row in written]),
                "sequence_lengths": torch.tensor([[len(row)] for row in written]),
            }


@contextmanager
def turned(model: Model, mrope: MropeParams, row: int, prompt_length: int) -> Iterator[None]:
    """The model's rotary angles as the attention plug-in takes them: by place from the table, then by position."""
    table, deltas = mrope.mrope_rotary_cos_sin, mrope.mrope_position_deltas
    assert table is not None
    assert table.dtype == torch.float32
    assert table.dim() == 2
    assert deltas is not None
    assert deltas.dtype == torch.int32
    assert deltas.shape == (len(table), 1)
    rotary = model.whole.model.language_model.rotary_emb
    config = model.whole.config.text_config
    halves = table[row].reshape(config.max_position_embeddings, -1, 2)  # [context, width / 2, 2]
    plain = rotary.forward

    def forward(hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        places = position_ids[0, 0]
        if int(places[-1]) >= prompt_length:
            cosine, sine = plain(hidden, position_ids + int(deltas[row]))
            return cosine, sine
        cosine, sine = (torch.cat([halves[places, :, part]] * 2, dim=-1)[None] for part in (0, 1))
        return cosine, sine

    rotary.forward = forward
    try:
        yield
    finally:
        rotary.forward = plain
