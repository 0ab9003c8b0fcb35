"""llama.cpp as the language model: a GGUF file answers in place of the bundle's decoder.

Through llama.h alone, as llama-cpp-python binds it. Text goes in as token ids and kept rows as embeddings, each run of
either by one `llama_decode`. Checked against llama.cpp 0.5 (include/llama.h, src/llama-batch.cpp): rows carry their
planes behind them; M-RoPE takes four positions a row, section by section, and the positions of every other model must
have no gaps.
"""

import ctypes
import os
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from importlib import import_module
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from resprune.runtime.arguments import whole
from resprune.runtime.backends.backend import (
    Backend,
    BackendFactory,
    Embedding,
    Piece,
    Request,
    expanded_ids,
    require_plain_attention,
)
from resprune.runtime.backends.gguf_names import ARCHITECTURES
from resprune.runtime.backends.session import SessionOptions
from resprune.runtime.bundle.files import Bundle
from resprune.runtime.errors import ResPruneError, one_line, shown
from resprune.runtime.families.table import family_of
from resprune.runtime.generate import generate
from resprune.runtime.prompt.prompter import load_tokenizer
from resprune.runtime.prompt.splice import PLANE_EMBEDS, Floats, Ints
from resprune.runtime.sampling import Sampling, eos_token_ids

MAGIC = b"GGUF"
ALL_F32 = "0"
"""`general.file_type` of a file without narrower weights."""
F32, F16 = 0, 1
NO_FLASH_ATTENTION = 0
UBATCH = 512
PLANE_FEATURES = "plane_features."
"""What the names of the vision graph's further outputs begin with."""
MOST_PROMPTS = 256
"""LLAMA_MAX_SEQ."""
UNLIKE = 0.01
"""The share of the vocabulary in which the file's spelling may differ: converters rename tokens that are never used."""
INSTALL = "pip install 'resprune[llamacpp]' (it compiles llama.cpp), and try again"


def llamacpp(model: str | Path, *, gpu_layers: int = 0) -> BackendFactory:
    """What `Pipeline.load(bundle, generator=…)` takes to answer with the language model of a GGUF file.

    The first `gpu_layers` of its layers go to the GPU, −1 for all, where llama-cpp-python was built for one. The
    threads are those of `Pipeline.load`. Raises `ResPruneError` for a file that is not the bundle's language model.
    """
    path = Path(model)
    whole(gpu_layers, "gpu_layers (-1 for all)", -1)

    def factory(bundle: Bundle, embedding: Embedding, options: SessionOptions) -> Backend:
        require_plain_attention(bundle, "llama.cpp")
        if family_of(bundle).position_axes == 1 and bundle.manifest.positions == "original":
            raise ResPruneError(
                "llama.cpp takes no gaps between the positions of this model, and this bundle was exported with "
                "--positions original; export it again with --positions contiguous"
            )
        loaded = Model(path, gpu_layers, options.threads)
        try:
            check(loaded, bundle)
        except BaseException:
            loaded.close()
            raise
        return LlamaBackend(loaded, bundle)

    return factory


class Model:
    """A GGUF file in memory. What uses it keeps it alive: the weights go with the last reference."""

    def __init__(self, path: Path, gpu_layers: int, threads: int) -> None:
        self.path = path
        self.threads = threads
        self.closed = False
        _require_gguf(path)
        self.lib = _package()
        settings = self.lib.llama_model_default_params()
        settings.n_gpu_layers = gpu_layers
        self._said = _listen(self.lib)
        self.pointer = self.lib.llama_model_load_from_file(str(path).encode(), settings)
        if not self.pointer:
            raise ResPruneError(f"llama.cpp cannot open {path} ({self.reason()}); is the file whole?")
        weakref.finalize(self, self.lib.llama_model_free, self.pointer)
        self.vocabulary = self.lib.llama_model_get_vocab(self.pointer)

    def reason(self) -> str:
        """The last error that llama.cpp told."""
        return one_line(self._said[-1]) if self._said else "it says no reason"

    def metadata(self, key: str) -> str | None:
        """A value of the file's header, as text."""
        room = ctypes.create_string_buffer(256)
        size = self.lib.llama_model_meta_val_str(self.pointer, key.encode(), room, len(room))
        return room.value.decode(errors="replace") if size >= 0 else None

    @property
    def vocabulary_size(self) -> int:
        """How many logits it gives."""
        return int(self.lib.llama_vocab_n_tokens(self.vocabulary))

    def token(self, number: int) -> str:
        """How the file writes a token."""
        text = self.lib.llama_vocab_get_text(self.vocabulary, number)
        return (text or b"").decode(errors="replace")

    def close(self) -> None:
        """Answers that are still being read raise when they step."""
        self.closed = True


def check(model: Model, bundle: Bundle) -> None:
    """`ResPruneError`, naming what does not fit, unless the file can be the language model of the bundle."""
    lib, path = model.lib, model.path
    config = bundle.json("config.json")
    text = config.get("text_config")
    kind = text.get("model_type") if isinstance(text, dict) else None
    if kind is None:  # a config of one level, or one that leaves out the usual kind
        flat = f"{config.get('model_type')}_text"
        kind = flat if flat in ARCHITECTURES else "llama"
    expected, found = ARCHITECTURES.get(str(kind)), model.metadata("general.architecture")
    if expected is None:
        raise ResPruneError(
            f"resprune knows no GGUF architecture for the language model {one_line(kind)}; leave out --gguf"
        )
    if found != expected:
        raise ResPruneError(
            f"{path} has the architecture {one_line(found)} and the bundle's language model is {expected} in GGUF; "
            "give the file of that model"
        )
    width = bundle.graph("embed_tokens").outputs[0].shape[-1]
    if lib.llama_model_n_embd(model.pointer) != width:
        raise ResPruneError(
            f"{path} has rows of {lib.llama_model_n_embd(model.pointer)} numbers and the bundle of {width}; "
            "give the file of the bundle's language model"
        )
    planes = sum(output.name.startswith(PLANE_FEATURES) for output in bundle.graph("vision_select").outputs)
    rows = lib.llama_model_n_embd_inp(model.pointer)
    if rows != width * (1 + planes):
        raise ResPruneError(
            f"{path} takes rows of {rows} numbers with their planes and the bundle has {width * (1 + planes)}; "
            "give the file of the bundle's language model"
        )
    if planes >= int(model.metadata(f"{found}.block_count") or 0):
        raise ResPruneError(f"llama.cpp adds no plane after the last layer of {path}; leave out --gguf")
    trained, context = lib.llama_model_n_ctx_train(model.pointer), bundle.manifest.context_length
    if trained < context:
        raise ResPruneError(
            f"{path} takes {trained} tokens and the bundle's prompts up to {context}; give a file that takes as many"
        )
    _check_vocabulary(model, bundle)


def _check_vocabulary(model: Model, bundle: Bundle) -> None:
    """Every token that the bundle writes, and those that end an answer, must be the file's too."""
    tokenizer, size = load_tokenizer(bundle), model.vocabulary_size
    added = tokenizer.get_added_tokens_decoder()
    ids = {number: text for text, number in tokenizer.get_vocab(with_added_tokens=False).items()}
    plain = [number for number in ids if number not in added]
    largest = max([*plain, *eos_token_ids(bundle)], default=0)
    if largest >= size:
        raise ResPruneError(
            f"{model.path} has a vocabulary of {size} tokens and the bundle has token {largest}; "
            "give the file of the bundle's language model"
        )
    unlike = [number for number in plain if model.token(number) != ids[number]]
    if len(unlike) > UNLIKE * len(plain):
        number = min(unlike)
        raise ResPruneError(
            f"{model.path} has another vocabulary than the bundle: token {number} is {shown(model.token(number))}, not "
            f"{shown(ids[number])}; give the file of the bundle's language model"
        )


class LlamaBackend:
    """Answers from the logits of llama.cpp, which are sampled here; each request has a context of its own."""

    def __init__(self, model: Model, bundle: Bundle) -> None:
        self._model = model
        self._eos = eos_token_ids(bundle)
        self._image_token_id = bundle.manifest.image_token_id

    def start(self, request: Request, sampling: Sampling) -> Iterator[list[Piece]]:
        """Prefill; then a token a row (see `Backend`)."""
        prompts = [expanded_ids(request, row, self._image_token_id) for row in range(len(request.prompts))]
        size = self._model.vocabulary_size
        missing = {token for prompt in prompts for token in prompt if token >= size} - {self._image_token_id}
        if missing:
            raise ResPruneError(
                f"the prompt has token {min(missing)} and {self._model.path} ends at {size - 1}; "
                "export the language model with --for gguf, which has them all"
            )
        sequence = LlamaSequence(self._model, request, prompts, self._image_token_id, sampling.max_new_tokens)
        return self._answers(sequence, sampling, prompts)

    def _answers(
        self, sequence: "LlamaSequence", sampling: Sampling, prompts: list[list[int]]
    ) -> Iterator[list[Piece]]:
        with closing(sequence):
            for tokens in generate(sequence, sampling, self._eos, prompts):
                yield [[] if token is None else [token] for token in tokens]

    def close(self) -> None:
        """Free the language model."""
        self._model.close()


class LlamaSequence:
    """A batch of prompts in a context of llama.cpp, prompt b as its sequence b (see `backend.Sequence`)."""

    def __init__(
        self, model: Model, request: Request, prompts: list[list[int]], image_token_id: int, new_tokens: int
    ) -> None:
        self._model = model
        self._context = _Context(model, len(prompts), max(map(len, prompts)) + new_tokens)
        spliced = request.spliced
        planes = [
            rows for name, rows in spliced.row_inputs.items() if name.startswith(PLANE_EMBEDS.format(""))
        ]
        rows = np.concatenate([spliced.inputs_embeds, *planes], axis=-1)  # [B, S, D·(1 + planes)]
        positions = spliced.position_ids.reshape(-1, *rows.shape[:2])  # [1 or 3, B, S]
        logits = []
        try:
            for number, prompt in enumerate(prompts):
                behind = rows.shape[1] - len(prompt)
                for is_image, begin, end in _runs(prompt, image_token_id):
                    at = slice(behind + begin, behind + end)
                    if is_image:
                        given, numbers = rows[number, at], positions[:, number, at]
                    else:
                        given, numbers = np.asarray(prompt[begin:end], np.int32), positions[:1, number, at]
                    self._context.decode(given, numbers, [number] * (end - begin))
                logits.append(self._context.logits(-1))
        except BaseException:
            self.close()
            raise
        self.logits: Floats = np.stack(logits)
        self._next: Ints = positions[0, :, -1] + 1

    def step(self, tokens: Ints) -> None:
        """Append one token a row, all in one decode."""
        if self._model.closed:
            raise ResPruneError(
                "the pipeline was closed before this answer was read to its end; read it before that"
            )
        batch = range(len(tokens))
        self._context.decode(tokens.astype(np.int32), self._next[None], list(batch), every=True)
        self.logits = np.stack([self._context.logits(row) for row in batch])
        self._next = self._next + 1

    def close(self) -> None:
        """Free the cache."""
        self._context.close()


class _Context:
    """A KV cache of `sequences` prompts with `length` tokens each, and the model that it belongs to."""

    def __init__(self, model: Model, sequences: int, length: int) -> None:
        if sequences > MOST_PROMPTS:
            raise ResPruneError(
                f"llama.cpp answers at most {MOST_PROMPTS} questions at once, not {sequences}; ask fewer"
            )
        lib = self._lib = model.lib
        self._model = model
        settings = lib.llama_context_default_params()
        settings.n_ctx = sequences * _rounded(length)
        settings.n_seq_max = sequences
        settings.n_batch = max(_rounded(length), sequences)
        settings.n_ubatch = min(UBATCH, settings.n_batch)
        settings.n_threads = settings.n_threads_batch = model.threads or os.cpu_count() or 1
        settings.no_perf = True
        exact = model.metadata("general.file_type") == ALL_F32
        settings.type_k = settings.type_v = F32 if exact else F16
        if exact:
            settings.flash_attn_type = NO_FLASH_ATTENTION
        self._pointer = lib.llama_init_from_model(model.pointer, settings)
        if not self._pointer:
            raise ResPruneError(
                f"llama.cpp cannot make room for {settings.n_ctx} tokens ({model.reason()}); ask fewer questions at "
                "once, or for shorter answers"
            )
        self._free = weakref.finalize(self, lib.llama_free, self._pointer)

    def decode(
        self,
        given: npt.NDArray[Any],
        positions: Ints,
        sequences: list[int],
        *,
        every: bool = False,
    ) -> None:
        """Take in `given`: token ids [n] int32, or rows [n, width] float32.

        `positions` [1, n], or of rows [3, n]; `sequences` [n] says whose each is. Logits are kept of the last, or with
        `every` of each.
        """
        lib, count = self._lib, len(given)
        if len(positions) == 3:  # time, height and width, and a fourth that images do not use
            positions = np.concatenate([positions, np.zeros_like(positions[:1])])
        # The arrays live until llama.cpp has read them.
        numbers = np.ascontiguousarray(positions, np.int32).reshape(-1)
        values = np.ascontiguousarray(given)
        ones = np.ones(count, np.int32)
        owners = (ctypes.POINTER(ctypes.c_int32) * count)(
            *[ctypes.pointer(ctypes.c_int32(number)) for number in sequences]
        )
        wanted = np.full(count, every, np.int8)
        wanted[-1] = 1
        batch = lib.llama_batch()
        batch.n_tokens = count
        if values.ndim == 1:
            batch.token = values.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        else:
            batch.embd = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        batch.pos = numbers.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        batch.n_seq_id = ones.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        batch.seq_id = owners
        batch.logits = wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        status = lib.llama_decode(self._pointer, batch)
        if status:
            raise ResPruneError(f"llama.cpp cannot take the prompt (status {status}: {self._model.reason()})")

    def logits(self, row: int) -> Floats:
        """[vocabulary] float32 after item `row` of the last decode; −1 is the last that has any."""
        pointer = self._lib.llama_get_logits_ith(self._pointer, row)
        return np.ctypeslib.as_array(pointer, (self._model.vocabulary_size,)).copy()

    def close(self) -> None:
        """Free it, once."""
        self._free()


def _runs(prompt: list[int], image_token_id: int) -> Iterator[tuple[bool, int, int]]:
    """The prompt's runs of image tokens and of text in turn: whether of images, where it begins and ends."""
    begin = 0
    for is_image, run in groupby(prompt, lambda token: token == image_token_id):
        end = begin + sum(1 for _ in run)
        yield is_image, begin, end
        begin = end


def _rounded(length: int) -> int:
    """llama.cpp gives room in steps of 256 tokens."""
    return -(-length // 256) * 256


def _require_gguf(path: Path) -> None:
    """`ResPruneError` for what does not begin as a GGUF file does."""
    try:
        with path.open("rb") as file:
            begins = file.read(len(MAGIC))
    except OSError as error:
        raise ResPruneError(
            f"{path} cannot be read ({error.strerror}); give the path of a GGUF file"
        ) from None
    if begins != MAGIC:
        raise ResPruneError(f"{path} is not a GGUF file; make one with resprune export --for gguf")


def _package() -> ModuleType:
    """The binding of llama.h; `ResPruneError` where it is missing or cannot be used."""
    try:
        return import_module("llama_cpp.llama_cpp")
    except ImportError:
        raise ResPruneError(f"--gguf needs llama-cpp-python; {INSTALL}") from None
    except (OSError, RuntimeError, AttributeError) as error:
        raise ResPruneError(
            f"llama-cpp-python is installed and its library cannot be used ({one_line(error)}); {INSTALL}"
        ) from None


_ERROR_LEVEL = 4
_errors: deque[str] = deque(maxlen=20)
_listener: list[Any] = []


def _listen(lib: ModuleType) -> deque[str]:
    """What llama.cpp says goes here in place of stderr; its errors are kept."""

    def heard(level: int, text: bytes, data: object) -> None:
        if level == _ERROR_LEVEL and text.strip():
            _errors.append(text.decode(errors="replace").strip())

    if not _listener:
        _listener.append(lib.llama_log_callback(heard))  # kept, for C holds no reference
        lib.llama_backend_init()
    lib.llama_log_set(_listener[0], None)
    _errors.clear()
    return _errors
