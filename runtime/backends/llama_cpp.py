"""llama.cpp as the language model: a GGUF file answers in place of the bundle's decoder.

Text goes in as token ids and kept rows as embeddings, each run of either by one decode. Rows carry their planes behind
them; M-RoPE takes three positions a row, and the positions of every other model must have no gaps.
"""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np

from resprune.names import EMBED_TOKENS, PLANE_EMBEDS
from resprune.runtime.arguments import whole
from resprune.runtime.backends.backend import (
    Backend,
    BackendFactory,
    Embedding,
    Piece,
    Place,
    Request,
    answers,
    closed_early,
    expanded_ids,
    require_plain_attention,
)
from resprune.runtime.backends.llama_library import Context, Model
from resprune.runtime.backends.session import SessionOptions
from resprune.runtime.bundle.files import Bundle
from resprune.runtime.defaults import GPU_LAYERS
from resprune.runtime.errors import ResPruneError, one_line, shown
from resprune.runtime.families.language_models import LANGUAGE_MODELS
from resprune.runtime.families.table import family_of
from resprune.runtime.prompt.prompter import load_tokenizer
from resprune.runtime.prompt.splice import Floats, Ints
from resprune.runtime.sampling import Sampling, eos_token_ids

UNLIKE = 0.01
"""The share of the vocabulary in which the file's spelling may differ: converters rename tokens that are never used."""


def llamacpp(model: str | Path, *, gpu_layers: int = GPU_LAYERS) -> BackendFactory:
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


def check(model: Model, bundle: Bundle) -> None:
    """`ResPruneError`, naming what does not fit, unless the file can be the language model of the bundle."""
    lib, path = model.lib, model.path
    config = bundle.json("config.json")
    text = config.get("text_config")
    kind = text.get("model_type") if isinstance(text, dict) else None
    if kind is None:  # a config of one level, or one that leaves out the usual kind
        flat = f"{config.get('model_type')}_text"
        kind = flat if flat in LANGUAGE_MODELS else "llama"
    row, found = LANGUAGE_MODELS.get(str(kind)), model.metadata("general.architecture")
    if row is None or not row.gguf:
        raise ResPruneError(
            f"resprune knows no GGUF architecture for the language model {one_line(kind)}; leave out --gguf"
        )
    if found != row.gguf:
        raise ResPruneError(
            f"{path} has the architecture {one_line(found)} and the bundle's language model is {row.gguf} in GGUF; "
            "give the file of that model"
        )
    width = bundle.graph(EMBED_TOKENS).outputs[0].shape[-1]
    if lib.llama_model_n_embd(model.pointer) != width:
        raise ResPruneError(
            f"{path} has rows of {lib.llama_model_n_embd(model.pointer)} numbers and the bundle of {width}; "
            "give the file of the bundle's language model"
        )
    planes = bundle.manifest.num_planes
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
        return answers(sequence, sampling, self._eos, prompts)

    def close(self) -> None:
        """Free the language model."""
        self._model.close()


class LlamaSequence:
    """A batch of prompts in a context of llama.cpp, prompt b as its sequence b (see `backend.Sequence`)."""

    def __init__(
        self, model: Model, request: Request, prompts: list[list[int]], image_token_id: int, new_tokens: int
    ) -> None:
        self._model = model
        self._context = Context(model, len(prompts), max(map(len, prompts)) + new_tokens)
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
        self._place = Place.of(spliced)

    def step(self, tokens: Ints) -> None:
        """Append one token a row, all in one decode."""
        if self._model.closed:
            raise closed_early()
        self._place.step()
        batch = range(len(tokens))
        positions = self._place.position_ids.reshape(-1, len(tokens))[:1]  # of text, the same on every axis
        self._context.decode(tokens.astype(np.int32), positions, list(batch), every=True)
        self.logits = np.stack([self._context.logits(row) for row in batch])

    def close(self) -> None:
        """Free the cache."""
        self._context.close()


def _runs(prompt: list[int], image_token_id: int) -> Iterator[tuple[bool, int, int]]:
    """The prompt's runs of image tokens and of text in turn: whether of images, where it begins and ends."""
    begin = 0
    for is_image, run in groupby(prompt, lambda token: token == image_token_id):
        end = begin + sum(1 for _ in run)
        yield is_image, begin, end
        begin = end
