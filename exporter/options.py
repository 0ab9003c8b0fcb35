"""What the user of `resprune export` may choose, and which choices do not go together."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resprune.method import SettingError, Settings, setting, share_of
from resprune.runtime.arguments import choice, flag, instance, text, whole
from resprune.runtime.backends.formats import GGUF_TYPES
from resprune.runtime.budget import Budget
from resprune.runtime.bundle.manifest import ATTENTION, OPTIMIZE, POSITIONS, Early
from resprune.runtime.bundle.precisions import BLOCK, BLOCK_SIZES, parse_dtype
from resprune.runtime.errors import ResPruneError, shown

if TYPE_CHECKING:
    from resprune.exporter.components import Components

VERIFY = ("auto", "full", "layers")


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """What the user may choose: the selection's `Settings`, with either `k` or `share`, and how it is exported.

    A field is the option of `resprune export` of its name (docs/options.md), but for five: `k` and `share` are -k,
    `language_checkpoint` is --for trtllm, `gguf` is --for gguf with its --gguf-type, and `decoder` False is
    --without-decoder. `command` is what the manifest says made the bundle. `early` is a first selection inside the
    vision tower, as `EarlyRequest.parse` reads it. `positions` and `attention` None mean the family's default,
    `max_pixels` None the checkpoint's own limit; `chat_template` is a file that takes the place of the checkpoint's
    template; `language_checkpoint` writes the language model once more as a plain Hugging Face checkpoint, `gguf` as a
    GGUF file of f32, f16 or q8_0. Without a `decoder` the bundle has vision, selection and embeddings alone. `verify`
    "full" compares whole answers, "layers" the decoder layer by layer, "auto" whichever fits in memory.
    """

    dtype: str = "fp32"
    block: int = BLOCK
    optimize: str | None = None
    split: bool = False
    positions: str | None = None
    attention: str | None = None
    early: str | None = None
    language_checkpoint: bool = False
    gguf: str | None = None
    decoder: bool = True
    max_pixels: int | None = None
    chat_template: Path | None = None
    revision: str | None = None
    verify: str = "auto"
    force: bool = False
    command: str = "resprune export"

    def check(self) -> Options:
        """These options, with NumPy's numbers as Python's.

        Raises `ResPruneError` for a value that makes no sense, and for two that exclude each other.
        """
        checked = replace(
            self, **{one.name: taken(one.name, getattr(self, one.name)) for one in fields(self)}
        )
        if (checked.k is None) == (checked.share is None):
            raise ResPruneError("give the tokens to keep either as a number or as a share")
        if checked.optimize and parse_dtype(checked.dtype).element == "bfloat16":
            raise ResPruneError(
                "optimize makes a decoder of ONNX Runtime's operators, and its CPU kernels of them know no bf16; "
                "let dtype be fp16 or fp32, or leave optimize out"
            )
        if checked.optimize and not checked.decoder:
            raise ResPruneError(
                "optimize is of the decoder, and there is to be none; leave out one of the two"
            )
        if checked.attention == "proportional" and (checked.language_checkpoint or checked.gguf):
            raise ResPruneError(
                "a language model by itself is for runtimes that attend to every row alike, which is not what "
                "proportional attention is for; leave out one of the two"
            )
        return checked


@dataclass(frozen=True)
class EarlyRequest:
    """What `--early LAYER:TOKENS` asks for: each a number, or a share of the blocks, or of the tokens."""

    layer: Budget
    tokens: Budget

    @staticmethod
    def parse(text: str) -> EarlyRequest:
        """`8:288` or `33%:50%`; `ResPruneError` for anything else."""
        layer, _, tokens = text.partition(":")
        try:
            request = EarlyRequest(Budget.parse(layer), Budget.parse(tokens))
        except ResPruneError:
            request = None
        if request is None or request.layer.everything or request.tokens.everything:
            raise ResPruneError(
                f"early {shown(text)} is not LAYER:TOKENS; give numbers from 1, as in 8:288, or shares, as in 33%:50%"
            )
        return request

    def of(self, components: Components, title: str) -> Early:
        """The blocks and tokens that it comes to; `ResPruneError` where the tower of family `title` cannot do it."""
        if not (components.protected is None and components.attached_to is None):
            raise ResPruneError(
                f"--early would drop tokens of {title} that are protected or attached to others; leave it out"
            )
        tower, blocks = components.vision.tower, len(components.vision.layers)
        if tower is None:
            raise ResPruneError(f"--early is not built for the vision tower of {title}; leave it out")
        layer = self.layer.k or max(1, round((self.layer.share or 0.0) * blocks))  # the other one is None
        share = self.tokens.share
        tokens = self.tokens.k or share_of(share or 0.0, tower.tokens)
        last = min(blocks, *tower.layers) - 1
        if last < 1:
            raise ResPruneError(
                f"--early needs a block before it, and the projector takes hidden state {min(tower.layers)} of the "
                f"tower's {blocks} blocks; leave it out"
            )
        if layer > last:
            taken = ", ".join(map(str, tower.layers))
            raise ResPruneError(
                f"--early after block {layer}: give 1 to {last}, for the tower has {blocks} blocks and the projector "
                f"takes hidden states {taken}"
            )
        if tokens >= tower.tokens:
            raise ResPruneError(
                f"--early keeps {tokens} of the {tower.tokens} tokens of an image or tile; give 1 to {tower.tokens - 1}"
            )
        return Early(layer, tokens, tower.tokens, share if tower.varies else None)


def _parsed(parse: Callable[[str], object]) -> Callable[[Any, str], str]:
    """The rule of a text that `parse` understands."""

    def rule(value: Any, name: str) -> str:
        parse(text(value, name))
        return str(value)

    return rule


def _block(value: Any, name: str) -> int:
    size = whole(value, name, 1)
    if size not in BLOCK_SIZES:
        raise ResPruneError(f"{name} should be one of {', '.join(map(str, BLOCK_SIZES))}, not {shown(size)}")
    return size


RULES: dict[str, Callable[[Any, str], Any]] = {
    "dtype": _parsed(parse_dtype),
    "block": _block,
    "optimize": partial(choice, choices=OPTIMIZE),
    "split": flag,
    "positions": partial(choice, choices=POSITIONS),
    "attention": partial(choice, choices=ATTENTION),
    "early": _parsed(EarlyRequest.parse),
    "language_checkpoint": flag,
    "gguf": partial(choice, choices=GGUF_TYPES),
    "decoder": flag,
    "max_pixels": partial(whole, least=1, most=sys.maxsize),
    "chat_template": partial(instance, kind=Path, wanted="a Path"),
    "revision": text,
    "verify": partial(choice, choices=VERIFY),
    "force": flag,
    "command": text,
}
"""Of each field what takes its value, or raises `ResPruneError`; those of `Settings` have their rules there."""


def taken(name: str, value: Any) -> Any:
    """`value` as the field of `Options` has it; `ResPruneError` for one that is none.

    None is one where it is the default.
    """
    if value is None and getattr(Options, name) is None:
        return None
    if name in RULES:
        return RULES[name](value, name)
    try:
        return setting(name, value)
    except SettingError as error:
        raise ResPruneError(f"{name} should be {error.wanted}, not {shown(error.got)}") from None
