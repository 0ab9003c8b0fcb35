"""The language model of a vision-language model as a plain Hugging Face checkpoint, which trtllm-build and vLLM take.

Its config by itself, its weights under the names of a causal language model, copied byte for byte and never loaded,
and its tokenizer.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resprune.exporter.checkpoint.shards import DTYPES, INDEX_NAME, SINGLE_NAME, StoredTensor
from resprune.exporter.checkpoint.side_files import write_json
from resprune.exporter.language import decoder_prefix
from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.language_models import LANGUAGE_MODELS

Progress = Callable[[int], object]
SHARD_BYTES = 5 * 10**9
CHUNK_BYTES = 16 << 20
COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
OUTSIDE = "model."
"""What the names begin with that a language model by itself has."""
HEAD = "lm_head."
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class LanguageCheckpoint:
    """A language model by itself: its text config, and its stored weights by their names in the plain checkpoint."""

    config: Any
    weights: dict[str, StoredTensor]
    file = "language_model"
    """The folder in a bundle that it is written into."""

    @property
    def kind(self) -> str:
        """What it is, for a report."""
        return LANGUAGE_MODELS[self.config.model_type].causal_class

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(tensor.nbytes for tensor in self.weights.values())

    def write(self, destination: Path, side_files: Path, progress: Progress = lambda count: None) -> None:
        """Write the checkpoint into the new directory `destination`, with the tokenizer's files of `side_files`.

        `progress(count)` is called as `count` more bytes are written. Raises `OSError` if the disk is full.
        """
        destination.mkdir()
        for name in COPIED:
            if (side_files / name).is_file():
                shutil.copyfile(side_files / name, destination / name)
        dtype = str(next(iter(self.weights.values())).dtype).removeprefix("torch.")
        write_json(destination / "config.json", plain_config(self.config, dtype))
        shards = list(_shards(self.weights))
        if len(shards) == 1:
            _write_safetensors(destination / SINGLE_NAME, shards[0], progress)
            return
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            weight_map |= dict.fromkeys(shard, name)
            _write_safetensors(destination / name, shard, progress)
        index = {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map}
        write_json(destination / INDEX_NAME, index)


def language_checkpoint(model: Any, stored: Mapping[str, StoredTensor]) -> LanguageCheckpoint:
    """The language model of a weightless model whose weights `find_weights` has found.

    `ResPruneError` if a language model of its kind has no class of its own.
    """
    config = model.config.text_config
    if not LANGUAGE_MODELS[config.model_type].causal_class:
        raise ResPruneError(
            f"the language model {config.model_type} has no class of its own: TensorRT-LLM and SGLang take it in the "
            f"whole checkpoint, so give them that, and leave out --for"
        )
    return LanguageCheckpoint(config, language_weights(model, stored))


def language_weights(model: Any, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The weights of the language model in `stored`, by the names of a causal language model."""
    inside = decoder_prefix(model)
    weights = {
        OUTSIDE + name.removeprefix(inside): tensor
        for name, tensor in stored.items()
        if name.startswith(inside)
    }
    if not model.config.text_config.tie_word_embeddings:
        weights |= {name: tensor for name, tensor in stored.items() if name.startswith(HEAD)}
    return weights


def plain_config(config: Any, dtype: str) -> dict[str, Any]:
    """A text config as a config.json by itself, for transformers 5 and for those who still read 4's keys."""
    name = LANGUAGE_MODELS[config.model_type].causal_class
    table: dict[str, Any] = config.to_dict() | {"architectures": [name], "dtype": dtype}
    rope = dict(table["rope_parameters"])
    theta = rope.pop("rope_theta")
    scaling = None if rope.get("rope_type", "default") == "default" else rope
    return table | {"torch_dtype": dtype, "rope_theta": theta, "rope_scaling": scaling}


def _shards(weights: Mapping[str, StoredTensor]) -> Iterator[dict[str, StoredTensor]]:
    """The weights in order, in groups of at most SHARD_BYTES, or of one weight that is larger."""
    shard: dict[str, StoredTensor] = {}
    size = 0
    for name, tensor in weights.items():
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _write_safetensors(path: Path, weights: Mapping[str, StoredTensor], progress: Progress) -> None:
    """One file (https://huggingface.co/docs/safetensors), flushed to the disk."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in weights.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in weights.values():
            for chunk in _bytes(tensor):
                file.write(chunk)
                progress(len(chunk))
        file.flush()
        os.fsync(file.fileno())


def _bytes(tensor: StoredTensor) -> Iterator[bytes]:
    with tensor.file.open("rb") as file:
        file.seek(tensor.offset)
        left = tensor.nbytes
        while left:
            chunk = file.read(min(left, CHUNK_BYTES))
            if not chunk:
                raise ResPruneError(f"{tensor.file} has become shorter while it was read; download it again")
            left -= len(chunk)
            yield chunk
