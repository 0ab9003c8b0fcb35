"""The language model of a vision-language model as a GGUF file, which llama.cpp and what is built on it take.

Names and keys are those of the `gguf` package; what a kind of model needs besides is what llama.cpp's own converter
(conversion/ of llama.cpp 0.5) writes for it. Weights are read, converted and written one at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch

from resprune.exporter.checkpoint.language_checkpoint import language_weights
from resprune.exporter.checkpoint.shards import StoredTensor
from resprune.runtime.backends.formats import GGUF_TYPES
from resprune.runtime.bundle.manifest import LANGUAGE_GGUF
from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.language_models import GGUF_SPLITTERS, LANGUAGE_MODELS

Progress = Callable[[int], object]
TYPES = {name: gguf.GGMLQuantizationType[name.upper()] for name in GGUF_TYPES}
_UNNAMED = "[PAD{}]"


@dataclass(frozen=True)
class GgufModel:
    """A language model that is ready to be written: its text config, and its stored weights by their names in GGUF."""

    config: Any
    weights: dict[str, StoredTensor]
    precision: str
    planes: int
    file = LANGUAGE_GGUF
    """Its name in a bundle."""

    @property
    def kind(self) -> str:
        """What it is, for a report."""
        return f"{LANGUAGE_MODELS[self.config.model_type].gguf} in GGUF, {self.precision}"

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in the file."""
        return sum(_nbytes(tensor.shape, self._type(name, tensor)) for name, tensor in self.weights.items())

    def write(self, path: Path, side_files: Path, progress: Progress = lambda count: None) -> None:
        """Write the file, with the tokenizer and the chat template of `side_files`.

        `progress(count)` is called as `count` more bytes are written. Raises `OSError` if the disk is full, and
        `ResPruneError` for a weight that the precision cannot hold.
        """
        writer = gguf.GGUFWriter(path, LANGUAGE_MODELS[self.config.model_type].gguf)
        try:
            _add_settings(writer, self.config, self.planes, self.precision)
            _add_tokenizer(writer, self.config, side_files, self.weights["token_embd.weight"].shape[0])
            extra = _rotary_factors(self.config)
            for name, values in extra.items():
                writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
            for name, tensor in self.weights.items():
                kind = self._type(name, tensor)
                writer.add_tensor_info(
                    name, tensor.shape, np.dtype(np.float32), _nbytes(tensor.shape, kind), raw_dtype=kind
                )
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for values in extra.values():
                writer.write_tensor_data(values)
            for name, tensor in self.weights.items():
                values = gguf.quantize(self._values(name, tensor), self._type(name, tensor))
                if values.dtype == np.float16 and not np.isfinite(values).all():
                    raise ResPruneError(f"{name} has numbers that fp16 cannot hold; give --gguf-type f32")
                writer.write_tensor_data(values)
                progress(values.nbytes)
        finally:
            writer.close()

    def _type(self, name: str, tensor: StoredTensor) -> gguf.GGMLQuantizationType:
        """Vectors stay fp32, as in llama.cpp's converter; rows that make no whole blocks are fp16."""
        if len(tensor.shape) < 2:
            return TYPES["f32"]
        block, _ = gguf.GGML_QUANT_SIZES[TYPES[self.precision]]
        return TYPES[self.precision if tensor.shape[-1] % block == 0 else "f16"]

    def _values(self, name: str, tensor: StoredTensor) -> npt.NDArray[np.float32]:
        values: npt.NDArray[np.float32] = tensor.read().to(torch.float32).numpy()
        heads = {
            "attn_q": self.config.num_attention_heads,
            "attn_k": getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads,
        }
        part = name.split(".")[-2]
        if not LANGUAGE_MODELS[self.config.model_type].permuted or part not in heads:
            return values
        halves = values.reshape(heads[part], 2, -1, *values.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def gguf_model(model: Any, stored: Mapping[str, StoredTensor], precision: str, planes: int) -> GgufModel:
    """The language model of a weightless model whose weights `find_weights` has found, as f32, f16 or q8_0.

    `planes` are those of a visual token beside its main one. `ResPruneError` for a model that llama.cpp does not have.
    """
    config = model.config.text_config
    architecture = LANGUAGE_MODELS[config.model_type].gguf
    if not architecture:
        raise ResPruneError(
            f"resprune knows no GGUF architecture for the language model {config.model_type}; leave out --for gguf"
        )
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if "sliding_attention" in kinds or (window is not None and not kinds):
        raise ResPruneError(
            f"llama.cpp attends to all tokens where this model attends to the last {window}; leave out --for gguf"
        )
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    weights: dict[str, StoredTensor] = {}
    for name, tensor in language_weights(model, stored).items():
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise ResPruneError(f"llama.cpp has no place for the weight {name}; leave out --for gguf")
        weights[known] = tensor
    return GgufModel(config, weights, precision, planes)


def _nbytes(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape, dtype=np.int64)) // block * size


def _head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _add_settings(writer: gguf.GGUFWriter, config: Any, planes: int, precision: str) -> None:
    """The model's shape, as the keys of its architecture."""
    # ALL_F32, MOSTLY_F16, MOSTLY_Q8_0
    kinds = {kind.name.partition("_")[2].lower(): kind for kind in gguf.LlamaFileType}
    writer.add_file_type(kinds[precision])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    writer.add_key_length(_head_width(config))
    writer.add_value_length(_head_width(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = dict(config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    sections = rope.get("mrope_section")
    if sections:
        writer.add_rope_dimension_sections([*sections, 0, 0, 0, 0][:4])
    else:
        writer.add_rope_dimension_count(_head_width(config))
    if planes:
        writer.add_num_deepstack_layers(planes)
    scaling = rope.get("rope_type", "default")
    if scaling == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif scaling == "yarn" and not {"attention_factor", "mscale", "beta_fast", "beta_slow"} & rope.keys():
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif scaling not in ("default", "llama3", "mrope"):
        raise ResPruneError(f"the rotary scaling {scaling} has no form in GGUF here; leave out --for gguf")


def _rotary_factors(config: Any) -> dict[str, npt.NDArray[np.float32]]:
    """Llama 3's scaling is a divisor of every frequency, in a tensor of its own."""
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return {}
    width = _head_width(config)
    wavelengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, width, 2) / width)
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    trained = rope["original_max_position_embeddings"]
    smooth = np.clip((trained / wavelengths - low) / (high - low), 0, 1)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)}


def _add_tokenizer(writer: gguf.GGUFWriter, config: Any, side_files: Path, size: int) -> None:
    """The vocabulary, as llama.cpp keeps it; ids without a token get a name that no text makes."""
    table = json.loads((side_files / "tokenizer.json").read_text(encoding="utf-8"))
    model, added = table["model"], {token["id"]: token for token in table.get("added_tokens") or ()}
    listed = model["vocab"]
    plain = (
        {number: text for text, number in listed.items()}
        if isinstance(listed, dict)
        else {number: text for number, (text, _) in enumerate(listed)}
    )
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or ()]
    byte_level = model.get("type", "BPE") == "BPE" and not model.get("byte_fallback") and bool(merges)
    texts, kinds = [], []
    for number in range(size):
        token = added.get(number)
        text = token["content"] if token else plain.get(number)
        texts.append(_UNNAMED.format(number) if text is None else text)
        kinds.append(_kind(text, token, unknown=model.get("unk_token")))
    if byte_level:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_splitter(table))
        writer.add_token_merges(merges)
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(texts, merges, listed))
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_add_bos_token("TemplateProcessing" in json.dumps(table.get("post_processor")))
    for name, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id)):
        found = _special(side_files, config, f"{name}_token_id")
        if found is not None and 0 <= found < size:
            add(found)
    template = side_files / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8"))


def _kind(text: str | None, token: Mapping[str, Any] | None, unknown: str | None) -> int:
    if text is None:
        return int(gguf.TokenType.UNUSED)
    if text == unknown:
        return int(gguf.TokenType.UNKNOWN)
    if token is not None:
        return int(gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED)
    if re.fullmatch(r"<0x[0-9A-F]{2}>", text):
        return int(gguf.TokenType.BYTE)
    return int(gguf.TokenType.NORMAL)


def _splitter(table: Mapping[str, Any]) -> str:
    # Prompts of resprune go in as token ids: this is for whoever else opens the file.
    text = json.dumps(table.get("pre_tokenizer"), ensure_ascii=False).replace("\\\\", "\\")
    return next((name for part, name in GGUF_SPLITTERS if part in text), "default")


def _scores(texts: list[str], merges: list[str], listed: Any) -> list[float]:
    """Scores of a SentencePiece vocabulary: its own, or by which merge comes first."""
    if isinstance(listed, list):
        return [float(listed[number][1]) if number < len(listed) else 0.0 for number in range(len(texts))]
    rank = {pair.replace(" ", ""): -float(number) for number, pair in enumerate(merges)}
    return [rank.get(text, -float(len(merges))) for text in texts]


def _special(side_files: Path, config: Any, key: str) -> int | None:
    """A special token's id, from generation_config.json, else from the text config; the first of several."""
    file = side_files / "generation_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found = settings.get(key, getattr(config, key, None))
    return next(iter(found), None) if isinstance(found, list) else found
