"""What the user of `resprune export` may choose, and which choices do not go together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from resprune.exporter.early import Request
from resprune.method import Selection
from resprune.runtime.bundle.precisions import BLOCK, BLOCK_SIZES, parse_dtype
from resprune.runtime.errors import ResPruneError


@dataclass(frozen=True)
class Options:
    """What the user may choose: `k` tokens an image, or a `share` of its tokens, above 0 and at most 1.

    A field is the option of `resprune export` of its name (docs/options.md). `early` is a first selection inside the
    vision tower, as `early.Request.parse` reads it. `alpha`, `positions` and `attention` None mean the family's
    default, `max_pixels` None the checkpoint's own limit, `form` None what `choose_form` says; `chat_template` is a
    file that takes the place of the checkpoint's template; `language_checkpoint` writes the language model once more as
    a plain Hugging Face checkpoint, `gguf` as a GGUF file of f32, f16 or q8_0. Without a `decoder` the bundle has
    vision, selection and embeddings alone. `verify` "full" compares whole answers, "layers" the decoder layer by layer,
    "auto" whichever fits in memory.
    """

    k: int | None = None
    share: float | None = None
    dtype: str = "fp32"
    block: int = BLOCK
    optimize: str | None = None
    split: bool = False
    alpha: float | None = None
    scale: str = Selection.scale
    positions: str | None = None
    attention: str | None = None
    early: str | None = None
    body: str = Selection.body
    form: str | None = None
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
        if (self.k is None) == (self.share is None):
            raise ResPruneError("give the tokens to keep either as a number or as a share")
        if self.k is not None and self.k < 1:
            raise ResPruneError(f"-k {self.k} keeps no visual token; give 1 or more")
        if self.share is not None and not 0 < self.share <= 1:
            raise ResPruneError(
                f"-k {100 * self.share:g}% is no share of the visual tokens to keep; give more than 0% and at most 100%"
            )
        if self.block not in BLOCK_SIZES:
            raise ResPruneError(f"--block {self.block}: the sizes are {', '.join(map(str, BLOCK_SIZES))}")
        if self.max_pixels is not None and self.max_pixels < 1:
            raise ResPruneError(
                f"--max-pixels {self.max_pixels} is no size of an image; give a number from 1"
            )
        if self.early is not None:
            Request.parse(self.early)
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
