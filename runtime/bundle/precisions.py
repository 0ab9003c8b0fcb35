"""The precisions, one row each: exporter, verification, manifest and command line all read this table.

A precision is given for each component, `--dtype vision=int8,decoder=q4,embed=q8`, or as one word, which stands for
the three that its row names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from resprune.elements import FLOATS
from resprune.names import DECODER, EMBED_TOKENS, VISION_ENCODER, VISION_SELECT
from resprune.runtime.errors import ResPruneError, shown

BLOCK_SIZES = (32, 64, 128)
"""Numbers of a packed weight that may share a scale."""
BLOCK = BLOCK_SIZES[0]
"""How many do, unless --block says another."""
COMPONENTS = ("vision", "decoder", "embed")
GRAPHS = {
    VISION_SELECT: "vision",
    VISION_ENCODER: "vision",
    DECODER: "decoder",
    EMBED_TOKENS: "embed",
}
"""The component of each graph that holds weights; any other graph is fp32."""


@dataclass(frozen=True)
class Precision:
    """One row: what a word does to a component, and how far it may take it from PyTorch in float32."""

    word: str
    suffix: str
    """Of a graph's file name, before ".onnx"; transformers.js looks for the same."""
    element: str
    """Type of what the products by weights take and return, and of the decoder's KV cache; the rest is float32."""
    runs: str
    """Where it runs."""
    atol: float
    """Largest difference of an output, relative to its largest magnitude where that is above 1."""
    snr: float
    """Least signal-to-noise ratio of an output in dB: 20 is a noise of a tenth, 6 of a half."""
    agreement: float
    """Least share of positions in running text with PyTorch's most likely token."""
    untaught: tuple[float, float]
    """In place of `snr` and `agreement` where the weights are not trained: the logits of random ones are all alike, and
    each layer makes more of what the one before it lost."""
    layers: tuple[float, float]
    """In place of `snr`, of the cache and of the logits, where a few layers are run alone: little adds up there, but
    whether the weights are trained is not seen."""
    embeds_for: tuple[str, ...]
    """The element types of tower and decoder beside which embeddings can be it; none: it is for products alone."""
    alone: tuple[str, ...] = ()
    """What the word stands for if it is given alone, for each of COMPONENTS; nothing: itself for all."""
    quantized: bool = False
    """Whether weights are whole numbers; TensorRT does not take such operators."""
    exact: bool = False
    """Whether picks and greedy tokens are to be PyTorch's own, one by one."""
    text_atol: float = math.inf
    """As `atol`, of the logits at all positions of running text. Infinite where rounding moves one of so many as far
    as it likes, in bfloat16 too if weights are random: the noise and the agreement are what judges then."""
    bits: int | None = None
    """Of a weight that is packed in blocks for MatMulNBits; None for one that is not: whole numbers are then int8."""
    head_bits: int | None = None
    """As `bits`, of the output head: rounding it to 4 bits costs more than rounding all layers."""

    def of_untaught(self) -> Precision:
        """The row for weights that are not trained."""
        snr, agreement = self.untaught
        return replace(self, snr=snr, agreement=agreement)

    def of_layers(self, output: str) -> Precision:
        """The row for an output of a few layers that are run alone."""
        cache, logits = self.layers
        return replace(self, snr=logits if output == "logits" else cache)


TABLE = {
    row.word: row
    for row in (
        Precision(
            "fp32",
            "",
            "float32",
            "everywhere",
            atol=1e-4,
            snr=60,
            agreement=0.99,
            untaught=(60, 0.99),
            layers=(60, 60),
            embeds_for=("float32",),
            text_atol=1e-4,
            exact=True,
        ),
        Precision(
            "fp16",
            "_fp16",
            "float16",
            "GPUs, TensorRT; a CPU widens it",
            atol=5e-2,
            snr=40,
            agreement=0.97,
            untaught=(30, 0.9),
            layers=(50, 40),
            embeds_for=FLOATS,
            text_atol=5e-2,
        ),
        Precision(
            "bf16",
            "_bf16",
            "bfloat16",
            "TensorRT, CUDA",
            atol=1e-1,
            snr=25,
            agreement=0.85,
            untaught=(14, 0.6),
            layers=(32, 25),
            embeds_for=("bfloat16",),
        ),
        Precision(
            "int8",
            "_int8",
            "float32",
            "CPUs",
            atol=0.35,
            snr=12,
            agreement=0.7,
            untaught=(8, 0.3),
            layers=(23, 14),
            embeds_for=(),
            alone=("int8", "int8", "fp32"),
            quantized=True,
        ),
        Precision(
            "q8",
            "_quantized",
            "float32",
            "ONNX Runtime: CPU, CUDA, WebGPU",
            atol=0.15,
            snr=18,
            agreement=0.85,
            untaught=(14, 0.6),
            layers=(25, 14),
            embeds_for=FLOATS,
            quantized=True,
            bits=8,
            head_bits=8,
        ),
        Precision(
            "q4",
            "_q4",
            "float32",
            "ONNX Runtime: CPU, CUDA, WebGPU",
            atol=1.0,
            snr=6.5,
            agreement=0.5,
            untaught=(4, 0.2),
            layers=(9, 4),
            embeds_for=FLOATS,
            alone=("fp32", "q4", "fp32"),
            quantized=True,
            bits=4,
            head_bits=8,
        ),
        Precision(
            "q4f16",
            "_q4f16",
            "float16",
            "ONNX Runtime: CUDA, WebGPU",
            atol=1.0,
            snr=6.5,
            agreement=0.5,
            untaught=(4, 0.2),
            layers=(9, 4),
            embeds_for=("float16",),
            alone=("fp16", "q4f16", "fp16"),
            quantized=True,
            bits=4,
            head_bits=8,
        ),
    )
}


@dataclass(frozen=True)
class Preset:
    """What to export for one kind of device: words for `--dtype`, and whether the decoder is for ONNX Runtime alone."""

    dtype: str
    optimize: str | None
    title: str


PRESETS = {
    "cpu": Preset("vision=int8,decoder=q4,embed=q8", "ort", "ONNX Runtime on a CPU"),
    "gpu": Preset("fp16", None, "a GPU, by ONNX Runtime or TensorRT"),
    "web": Preset("q4f16", None, "ONNX Runtime Web and transformers.js"),
}
"""Chosen by the table in docs/precision.md."""


@dataclass(frozen=True)
class Choice:
    """A precision for each component."""

    vision: str
    decoder: str
    embed: str

    @property
    def element(self) -> str:
        """Of tower and decoder, which are one model while they are traced."""
        return TABLE[self.decoder].element

    @property
    def element_word(self) -> str:
        """The word that changes nothing of what is traced in `element`."""
        return _plain(self.element)

    def of(self, graph: str) -> Precision:
        """The row for one graph of the bundle."""
        return TABLE[getattr(self, GRAPHS[graph]) if graph in GRAPHS else "fp32"]

    def of_file(self, stem: str) -> Precision:
        """The row for a graph by its file's name, without ".onnx"."""
        return next(
            (row for graph in GRAPHS if stem == graph + (row := self.of(graph)).suffix), TABLE["fp32"]
        )


def words(rows: Iterable[Precision] = TABLE.values()) -> str:
    """The words that `--dtype` takes, for errors and help."""
    return ", ".join(row.word for row in rows)


def parse_dtype(text: str) -> Choice:
    """What `--dtype text` asks for: one word, or one for each component, where one left out is fp32.

    Raises `ResPruneError` for an unknown word or component, or element types that do not go together.
    """
    if "=" not in text:
        row = _row(text)
        return Choice(*(row.alone or (row.word,) * len(COMPONENTS)))
    chosen = dict.fromkeys(COMPONENTS, "")
    for part in text.split(","):
        component, _, word = part.partition("=")
        if component not in chosen or chosen[component]:
            raise ResPruneError(
                f"dtype {shown(text)}: each part should be a component and its precision, as in "
                f"vision=int8,decoder=q4,embed=q8; the components are {', '.join(COMPONENTS)}, each at most once"
            )
        chosen[component] = _row(word).word
    element = TABLE[chosen["decoder"] or chosen["vision"] or "fp32"].element
    plain = _plain(element)
    choice = Choice(**{component: word or plain for component, word in chosen.items()})
    if TABLE[choice.vision].element != element:
        fitting = words(row for row in TABLE.values() if row.element == element)
        raise ResPruneError(
            f"dtype {text}: with decoder={choice.decoder} the tower can be {fitting}; the two are traced as one "
            "model, so their arithmetic is of one type"
        )
    if element not in TABLE[choice.embed].embeds_for:
        fitting = words(row for row in TABLE.values() if element in row.embeds_for)
        raise ResPruneError(
            f"dtype {text}: with decoder={choice.decoder} the embeddings can be {fitting}; they are looked up, not "
            "multiplied"
        )
    return choice


def _plain(element: str) -> str:
    return next(row.word for row in TABLE.values() if row.element == element and not row.quantized)


def _row(word: str) -> Precision:
    if word not in TABLE:
        raise ResPruneError(f"{shown(word)} is no precision; dtype takes {words()}")
    return TABLE[word]
