"""llama.h, as llama-cpp-python binds it: a model file in memory, and KV caches that take token ids or rows.

Checked against llama.cpp 0.5 (include/llama.h, src/llama-batch.cpp).
"""

import ctypes
import os
import threading
import weakref
from collections import deque
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from resprune.runtime.errors import FailedError, ResPruneError, one_line
from resprune.runtime.prompt.splice import Floats, Ints

MAGIC = b"GGUF"
ALL_F32 = "0"
"""`general.file_type` of a file without narrower weights."""
F32, F16 = 0, 1
NO_FLASH_ATTENTION = 0
UBATCH = 512
MOST_PROMPTS = 256
"""LLAMA_MAX_SEQ."""
ERROR_LEVEL = 4
_LOADING = threading.Lock()
INSTALL = "pip install 'resprune[llamacpp]' (it compiles llama.cpp), and try again"


class _Errors(threading.local):
    """The errors that llama.cpp told a thread: it tells them to the one that called it."""

    def __init__(self) -> None:
        self.told: deque[str] = deque(maxlen=20)


class _Library:
    """The functions of llama.h, and the errors that they told: what llama.cpp says goes here, not to stderr."""

    def __init__(self) -> None:
        self.functions = _import()
        self.errors = _Errors()
        self._listener = self.functions.llama_log_callback(self._hear)  # kept, for C holds no reference
        self.functions.llama_backend_init()
        self.functions.llama_log_set(self._listener, None)

    def _hear(self, level: int, text: bytes, data: object) -> None:
        if level == ERROR_LEVEL and text.strip():
            self.errors.told.append(text.decode(errors="replace").strip())


def library() -> _Library:
    """One a process: llama.cpp has one listener, which must not be lost while it may speak to it."""
    with _LOADING:
        return _loaded()


@cache
def _loaded() -> _Library:
    return _Library()


class Model:
    """The GGUF file at `path` in memory, its first `gpu_layers` layers on the GPU (−1: all).

    What uses it keeps it alive: the weights go with the last reference. `threads` is for its contexts. Raises
    `ResPruneError` for a file that llama.cpp cannot open, and where llama-cpp-python is missing.
    """

    def __init__(self, path: Path, gpu_layers: int, threads: int) -> None:
        self.path = path
        self.threads = threads
        self.closed = False
        _require_gguf(path)
        loaded = library()
        self.lib = loaded.functions
        self._errors = loaded.errors
        self._errors.told.clear()
        settings = self.lib.llama_model_default_params()
        settings.n_gpu_layers = gpu_layers
        self.pointer = self.lib.llama_model_load_from_file(str(path).encode(), settings)
        if not self.pointer:
            raise ResPruneError(f"llama.cpp cannot open {path} ({self.reason()}); is the file whole?")
        weakref.finalize(self, self.lib.llama_model_free, self.pointer)
        self.vocabulary = self.lib.llama_model_get_vocab(self.pointer)

    def reason(self) -> str:
        """The first error that llama.cpp told this thread since it was last asked, from which the others follow."""
        told = [*self._errors.told, "it says no reason"]
        self._errors.told.clear()
        return one_line(told[0])

    def metadata(self, key: str) -> str | None:
        """A value of the file's header as text, None if there is no such key."""
        room = ctypes.create_string_buffer(256)
        size = self.lib.llama_model_meta_val_str(self.pointer, key.encode(), room, len(room))
        return room.value.decode(errors="replace") if size >= 0 else None

    @property
    def vocabulary_size(self) -> int:
        """How many logits it gives."""
        return int(self.lib.llama_vocab_n_tokens(self.vocabulary))

    def token(self, number: int) -> str:
        """The text of the token with the id `number`, as the file spells it."""
        text = self.lib.llama_vocab_get_text(self.vocabulary, number)
        return (text or b"").decode(errors="replace")

    def close(self) -> None:
        """Refuse every further step: answers that are still being read raise `ResPruneError`."""
        self.closed = True


class Context:
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
            raise FailedError(f"llama.cpp cannot take the prompt (status {status}: {self._model.reason()})")

    def logits(self, row: int) -> Floats:
        """[vocabulary] float32 after item `row` of the last decode; −1 is the last that has any."""
        pointer = self._lib.llama_get_logits_ith(self._pointer, row)
        values: Floats = np.ctypeslib.as_array(pointer, (self._model.vocabulary_size,)).copy()
        return values

    def close(self) -> None:
        """Free it, once."""
        self._free()


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


def _import() -> ModuleType:
    """The binding of llama.h; `ResPruneError` where it is missing or cannot be used."""
    try:
        return import_module("llama_cpp.llama_cpp")
    except ImportError:
        raise ResPruneError(f"--gguf needs llama-cpp-python; {INSTALL}") from None
    except (OSError, RuntimeError, AttributeError) as error:
        raise ResPruneError(
            f"llama-cpp-python is installed and its library cannot be used ({one_line(error)}); {INSTALL}"
        ) from None
