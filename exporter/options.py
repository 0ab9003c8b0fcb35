"""What the user of `resprune export` may choose, and which choices do not go together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from resprune.method import SettingError, Settings, check, share_of
from resprune.runtime.backends.formats import GGUF_TYPES
from resprune.runtime.budget import Budget
from resprune.runtime.bundle.manifest import ATTENTION, OPTIMIZE, POSITIONS, Early
from resprune.runtime.bundle.precisions import BLOCK, BLOCK_SIZES, parse_dtype
from resprune.runtime.errors import ResPruneError, shown

if TYPE_CHECKING:
    from resprune.exporter.components import Components

VERIFY = ("auto", "full", "layers")
CHOICES: dict[str, tuple[object, ...]] = {
    "block": BLOCK_SIZES,
    "optimize": OPTIMIZE,
    "positions": POSITIONS,
    "attention": ATTENTION,
    "gguf": GGUF_TYPES,
    "verify": VERIFY,
}
"""What a field can be beside its default; those of `Settings` have their rules there."""


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """What the user may choose: the selection's `Settings`, with either `k` or `share`, and how it is exported.

    A field is the option of `resprune export` of its name (docs/options.md). `early` is a first selection inside the
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

    def check(self) -> None:
        """Raise `ResPruneError` for a value that makes no sense, and for two that exclude each other."""
        try:
            check(**vars(self))
        except SettingError as error:
            raise ResPruneError(f"{error.name} should be {error.wanted}, not {shown(error.got)}") from None
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value != getattr(Options, name) and value not in known:
                words = ", ".join(map(str, known))
                raise ResPruneError(f"{name} should be one of {words}, not {shown(value)}")
        if (self.k is None) == (self.share is None):
            raise ResPruneError("give the tokens to keep either as a number or as a share")
        if self.max_pixels is not None and self.max_pixels < 1:
            raise ResPruneError(
                f"--max-pixels {self.max_pixels} is no size of an image; give a number from 1"
            )
        if self.early is not None:
            EarlyRequest.parse(self.early)
        if parse_dtype(self.dtype).element == "bfloat16" and self.optimize:
            raise ResPruneError(
                "--optimize ort makes a decoder of ONNX Runtime's operators, and its CPU kernels of them know no bf16; "
                "give --dtype fp16 or fp32, or leave it out"
            )
        if self.optimize and not self.decoder:
            raise ResPruneError("--optimize is of the decoder; leave out that or --without-decoder")
        if self.attention == "proportional" and (self.language_checkpoint or self.gguf):
            raise ResPruneError(
                "--for writes the language model for runtimes that attend to every row alike, which is not what "
                "--attention proportional is for; leave out one of the two"
            )


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
                f"--early {text} is not LAYER:TOKENS; give numbers from 1, as in 8:288, or shares, as in 33%:50%"
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
