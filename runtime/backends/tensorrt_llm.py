"""TensorRT-LLM in this process: its PyTorch backend, and engines that trtllm-build made.

It could not be installed here, so nothing of this has run on it: calls follow the signatures of TensorRT-LLM 1.2
(llmapi/llm.py, sampling_params.py, runtime/model_runner_cpp.py), and the tests hold them to those. It is made of
torch, which therefore only this file of the runtime imports, and only together with it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from inspect import getgeneratorlocals, isgenerator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from resprune.runtime.backends.backend import (
    Backend,
    BackendFactory,
    Embedding,
    Piece,
    Reading,
    Request,
    expanded_ids,
    require_images,
    require_plain_attention,
    together,
)
from resprune.runtime.backends.formats import ENGINE, PYTORCH
from resprune.runtime.backends.session import SessionOptions
from resprune.runtime.bundle.files import Bundle
from resprune.runtime.errors import ResPruneError, one_line
from resprune.runtime.families.rotary import Rotary
from resprune.runtime.families.table import family_of
from resprune.runtime.prompt.prompter import Prompt, load_tokenizer
from resprune.runtime.prompt.splice import Floats, Ints
from resprune.runtime.sampling import Sampling, eos_token_ids, named_settings

if TYPE_CHECKING:
    import torch


def pytorch_backend(model: str | Path) -> BackendFactory:
    """What `Pipeline.load(bundle, generator=…)` takes to answer with TensorRT-LLM's PyTorch backend.

    `model` is the directory or hub id of the whole checkpoint that the bundle was exported from.
    """

    def factory(bundle: Bundle, embedding: Embedding, options: SessionOptions) -> Backend:
        require_plain_attention(bundle, "TensorRT-LLM")
        family = family_of(bundle)
        if PYTORCH not in family.servers:
            raise ResPruneError(
                f"TensorRT-LLM's PyTorch backend makes up a grid for the visual tokens of {family.title}, so those "
                f"that were kept would get wrong positions; build an engine and use engine_backend"
            )
        _require_contiguous(bundle)
        with _faults(f"open {model}"):
            llm = _package().LLM(model=str(model))
        return PyTorchBackend(llm, bundle)

    return factory


def engine_backend(engine: str | Path) -> BackendFactory:
    """What `Pipeline.load(bundle, generator=…)` takes to answer from an engine of trtllm-build.

    `engine` is the directory of the engine. Build it from the `language_model/` that `resprune export --for trtllm`
    writes where the family's language model has a class of its own, else from the checkpoint, and with
    `--max_multimodal_len` of at least K times the images of a batch.
    """

    def factory(bundle: Bundle, embedding: Embedding, options: SessionOptions) -> Backend:
        require_plain_attention(bundle, "TensorRT-LLM")
        family = family_of(bundle)
        if ENGINE not in family.servers:
            raise ResPruneError(
                f"an engine of trtllm-build takes one row for each visual token and causal masks alone, which is not "
                f"enough for {family.title}; answer with another backend"
            )
        rotary = None if family.rotary is None else Angles(bundle, family.rotary)
        if rotary is None:
            _require_contiguous(bundle)
        with _faults(f"open {engine}"):
            runner = _package().runtime.ModelRunnerCpp.from_dir(engine_dir=str(engine))
        return EngineBackend(runner, bundle, rotary)

    return factory


class PyTorchBackend:
    """`tensorrt_llm.LLM`, which takes the prompt's text and a list of [K, D] tensors."""

    def __init__(self, llm: Any, bundle: Bundle) -> None:
        self._llm = llm
        self._tokenizer = load_tokenizer(bundle)
        self._eos = sorted(eos_token_ids(bundle))

    def start(self, request: Request, sampling: Sampling) -> Iterator[list[Piece]]:
        """Hand the prompts over (see `Backend`); TensorRT-LLM puts them in one batch as it sees fit."""
        require_images(request, "TensorRT-LLM")
        drawing = _drawing(
            sampling,
            {
                "max_new_tokens": "max_tokens",
                "min_new_tokens": "min_tokens",
                "min_p": "min_p",
                "seed": "seed",
            },
        )
        with _faults("take the prompt"):
            parameters = _package().SamplingParams(
                end_id=self._eos[0],
                stop_token_ids=self._eos[1:] or None,
                detokenize=False,
                **drawing,
            )
            results = (
                self._llm.generate_async(
                    {
                        "prompt": self._text(prompt),
                        "multi_modal_embeddings": {"image": [_tensor(image.rows) for image in images]},
                    },
                    sampling_params=parameters,
                    streaming=True,
                )
                for prompt, images in zip(request.prompts, request.images, strict=True)
            )
            return together(Reading(_new_tokens(result), partial(_abort, result)) for result in results)

    def close(self) -> None:
        """Shut TensorRT-LLM's workers down."""
        self._llm.shutdown()

    def _text(self, prompt: Prompt) -> str:
        """The text from which TensorRT-LLM's tokenizer, which adds what it adds, makes the ids of the prompt."""
        special = self._tokenizer.id_to_token(prompt.ids[0]) or ""
        for text in (prompt.text, prompt.text.removeprefix(special)):
            if self._tokenizer.encode(text, add_special_tokens=True).ids == prompt.ids:
                return text
        raise ResPruneError(
            "the tokenizer adds other special tokens than the chat template writes, and TensorRT-LLM's PyTorch backend "
            "takes text alone; build an engine and use engine_backend"
        )


class EngineBackend:
    """`ModelRunnerCpp`: visual token i of a prompt is the id vocab_size + i, and row i of its prompt table."""

    def __init__(self, runner: Any, bundle: Bundle, rotary: "Angles | None") -> None:
        self._runner = runner
        self._image_token_id = bundle.manifest.image_token_id
        self._eos = sorted(eos_token_ids(bundle))
        self._rotary = rotary

    def start(self, request: Request, sampling: Sampling) -> Iterator[list[Piece]]:
        """Enqueue the prompts (see `Backend`)."""
        require_images(request, "TensorRT-LLM")
        rows = [
            np.concatenate([image.rows for image in images]) for images in request.images
        ]  # each [K_b, D]
        ids = [self._ids(request, row) for row in range(len(rows))]
        drawing = _drawing(sampling, {"max_new_tokens": "max_new_tokens", "seed": "random_seed"})
        with _faults("take the prompt"):
            steps = self._runner.generate(
                batch_input_ids=[_tensor(np.asarray(row, np.int32)) for row in ids],
                prompt_table=_tensor(self._table(rows)),
                prompt_tasks=",".join(map(str, range(len(rows)))),
                mrope_params=None if self._rotary is None else self._rotary.parameters(request),
                end_id=self._eos[0],
                pad_id=self._eos[0],
                stop_words_list=[[[token] for token in self._eos]] * len(rows),
                streaming=True,
                return_dict=True,
                output_sequence_lengths=True,
                **drawing,
            )
        pieces = self._read(steps, [len(row) for row in ids])
        return Reading(pieces, partial(_cancel, self._runner, steps))

    def close(self) -> None:
        """Give the engine back."""
        del self._runner

    def _ids(self, request: Request, row: int) -> list[int]:
        ids = expanded_ids(request, row, self._image_token_id)
        visual = iter(range(self._runner.vocab_size, self._runner.vocab_size + len(ids)))
        return [next(visual) if token == self._image_token_id else token for token in ids]

    def _table(self, rows: list[Floats]) -> Floats:
        """[B, most rows, D], zeros where a prompt has fewer."""
        longest = max(map(len, rows))
        limit = int(self._runner.max_prompt_embedding_table_size)
        if longest * len(rows) > limit:
            raise ResPruneError(
                f"the engine takes {limit} visual tokens and there are {longest * len(rows)}; build it with "
                f"--max_multimodal_len {longest * len(rows)}, or keep fewer"
            )
        table = np.zeros((len(rows), longest, rows[0].shape[1]), np.float32)
        for index, row in enumerate(rows):
            table[index, : len(row)] = row
        return table

    @staticmethod
    def _read(steps: Iterator[dict[str, Any]], read: list[int]) -> Iterator[list[Piece]]:
        """`output_ids` [B, 1, S] begin with the prompt; `sequence_lengths` [B, 1] say how far they are written."""
        with _faults("answer"):
            for step in steps:
                lengths = [int(length) for length in step["sequence_lengths"][:, 0]]
                yield [
                    [int(token) for token in step["output_ids"][row, 0, start:end]]
                    for row, (start, end) in enumerate(zip(read, lengths, strict=True))
                ]
                read = lengths


class Angles:
    """M-RoPE as an engine takes it: cosine and sine of every place of the context, by the place's true position.

    An engine turns place s of the prompt by row s of this table, whatever stands there, so the tokens that were kept
    and the text behind them get the positions they had unpruned; what is generated goes on `deltas` after its place.
    """

    def __init__(self, bundle: Bundle, rotary: Rotary) -> None:
        config = bundle.json("config.json")
        try:
            text = config.get("text_config") or config
            rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
            width = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
            theta = float(rope.get("rope_theta") or text["rope_theta"])
            self._axes = rotary(rope["mrope_section"], width // 2)
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ResPruneError(
                f"config.json in {bundle.root} does not say how positions turn ({error}); export it again"
            ) from None
        self._frequencies = theta ** (-np.arange(0, width, 2) / width)
        self._context = bundle.manifest.context_length

    def table(self, position_ids: Ints) -> Floats:
        """`position_ids` [3, S] → [context, width / 2, 2] float32: cosine and sine."""
        places = np.zeros((self._context, 3))
        places[: position_ids.shape[1]] = position_ids.T
        angles = places[:, self._axes] * self._frequencies  # [context, width / 2]
        return np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)

    def parameters(self, request: Request) -> Any:
        """`MropeParams`: the tables [B, context · width] and how far positions are ahead of places, [B, 1]."""
        spliced = request.spliced
        positions = [
            spliced.position_ids[:, row, spliced.attention_mask[row] > 0]
            for row in range(len(request.prompts))
        ]
        deltas = [[spliced.ahead(row)] for row in range(len(positions))]
        return _package().layers.MropeParams(
            mrope_rotary_cos_sin=_tensor(np.stack([self.table(rows).reshape(-1) for rows in positions])),
            mrope_position_deltas=_tensor(np.asarray(deltas, np.int32)),
        )


def _drawing(sampling: Sampling, names: dict[str, str]) -> dict[str, Any]:
    """The settings by TensorRT-LLM's names, of which `names` has those that its two ways do not share."""
    shared = ("temperature", "top_k", "top_p", "repetition_penalty", "no_repeat_ngram_size")
    settings = named_settings(
        sampling, {name: name for name in shared} | names, "TensorRT-LLM", leave_neutral=True
    )
    # Without a top_k or a top_p it is greedy whatever the temperature.
    how = {"top_k": 1} if sampling.temperature == 0 else {"top_p": sampling.top_p}
    return {names["max_new_tokens"]: sampling.max_new_tokens} | settings | how


def _new_tokens(result: Any) -> Iterator[Piece]:
    """What each event of a streamed result adds."""
    seen = 0
    with _faults("answer"):
        for event in result:
            tokens = event.outputs[0].token_ids
            yield [int(token) for token in tokens[seen:]]
            seen = len(tokens)


def _abort(result: Any) -> None:
    if not result.finished:
        result.abort()


def _cancel(runner: Any, steps: Iterator[dict[str, Any]]) -> None:
    """Stop what `ModelRunnerCpp.generate` enqueued: it hands out no ids, and has none once it has ended.

    They are found in the generator that it returns; from any other iterator nothing can be stopped.
    """
    executor = getattr(runner, "session", None) or runner.executor  # as versions have it
    known = getgeneratorlocals(steps) if isgenerator(steps) else {}
    for number in known.get("request_ids", ()):
        executor.cancel_request(number)


def _require_contiguous(bundle: Bundle) -> None:
    if bundle.manifest.positions != "contiguous":
        raise ResPruneError(
            f"TensorRT-LLM numbers every prompt 0, 1, 2 …, and this bundle was exported with --positions "
            f"{bundle.manifest.positions}; export it again with --positions contiguous"
        )


def _package() -> Any:
    try:
        import tensorrt_llm
        import tensorrt_llm.layers  # pyright: ignore[reportMissingImports]
        import tensorrt_llm.runtime  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ResPruneError(
            f"TensorRT-LLM is not installed here ({error}); see "
            f"https://nvidia.github.io/TensorRT-LLM/installation/linux.html"
        ) from None
    return tensorrt_llm


def _tensor(array: npt.NDArray[Any]) -> "torch.Tensor":
    import torch  # TensorRT-LLM brings it: it takes its tensors, and no other backend comes here

    return torch.from_numpy(np.ascontiguousarray(array))


@contextmanager
def _faults(what: str) -> Iterator[None]:
    """Turn what TensorRT-LLM raises into one sentence."""
    try:
        yield
    except (RuntimeError, ValueError, OSError, AssertionError) as error:
        raise ResPruneError(f"TensorRT-LLM could not {what} ({one_line(error)})") from None
