"""`resprune export`: arguments in, exit status out. Heavy imports happen only when it runs."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from resprune.exporter.options import VERIFY, Options, taken
from resprune.method import BODIES, FORMS, SCALES
from resprune.runtime.backends.formats import GGUF_TYPE, GGUF_TYPES
from resprune.runtime.budget import Budget
from resprune.runtime.bundle.manifest import ATTENTION, LANGUAGE_GGUF, OPTIMIZE, POSITIONS
from resprune.runtime.bundle.precisions import BLOCK_SIZES, PRESETS, words
from resprune.runtime.errors import ResPruneError, printable, require_packages, require_python

NEEDED = (
    "torch",
    "transformers",
    "accelerate",
    "onnx",
    "onnxscript",
    "huggingface_hub",
    "filelock",
    "tqdm",
    "gguf",
)
POSIX = (("fcntl",), "it is part of Python on Linux and macOS, so on Windows take WSL")
"""For `require_packages`: folders are flushed as POSIX does it, here and for `build`, `eval` and `lmms`."""


def register_export(subparsers: Any) -> None:
    """Add the subcommand `export`."""
    from resprune.runtime.families.table import (
        aliases,
    )  # not for the commands that take `POSIX` of this module

    parser: argparse.ArgumentParser = subparsers.add_parser(
        "export",
        help="turn a checkpoint into a bundle",
        description="Turn a checkpoint into a bundle.",
        epilog=f"aliases: demo, {', '.join(sorted(aliases()))}",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="demo, another alias (see below), a hub id, or a directory",
    )
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="the bundle's directory, which must not exist yet"
    )
    parser.add_argument(
        "-k",
        dest="tokens",
        type=_budget,
        required=True,
        metavar="K",
        help="visual tokens to keep for each image, their share, as in 11%%, or all",
    )
    parser.add_argument(
        "--dtype",
        type=_field("dtype"),
        metavar="WORD",
        help=f"precision of the weights: {words()}, or one for each component, as in vision=int8,decoder=q4,embed=q8 "
        f"(default: {Options.dtype})",
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="by where it will run, in place of --dtype and --optimize: "
        + "; ".join(
            f"{name}: --dtype {preset.dtype}{f' --optimize {preset.optimize}' if preset.optimize else ''}"
            for name, preset in PRESETS.items()
        )
        + " (default: none)",
    )
    parser.add_argument(
        "--block",
        type=int,
        choices=BLOCK_SIZES,
        default=Options.block,
        help="numbers of a packed weight that share a scale: more are smaller and lose more (default: "
        f"{Options.block})",
    )
    parser.add_argument(
        "--optimize",
        choices=OPTIMIZE,
        help="a decoder of ONNX Runtime's own operators, for it alone (default: portable)",
    )
    parser.add_argument(
        "--split", action="store_true", help="also write encoder and selector apart: encode once, ask often"
    )
    parser.add_argument(
        "--alpha",
        type=_field("alpha", float),
        help="strength of the question's guidance, 0 for none (default: the family's)",
    )
    parser.add_argument(
        "--scale",
        choices=SCALES,
        default=Options.scale,
        help=f"how relevance is scaled (default: {Options.scale})",
    )
    parser.add_argument(
        "--positions",
        choices=POSITIONS,
        help="position ids of the pruned prompt (default: the family's)",
    )
    parser.add_argument(
        "--attention",
        choices=ATTENTION,
        help="proportional: a kept token counts for those it stands for as well (default: the family's)",
    )
    parser.add_argument(
        "--early",
        type=_field("early"),
        metavar="LAYER:TOKENS",
        help="a first selection inside the vision tower: after LAYER blocks only TOKENS of an image or tile go on, as "
        "in 8:288 or 33%%:50%% (default: none)",
    )
    parser.add_argument(
        "--body",
        choices=BODIES,
        default=Options.body,
        help=f"selection in Loops, or unrolled (default: {Options.body})",
    )
    parser.add_argument(
        "--form",
        choices=FORMS,
        help="products of the visual tokens: all at once, or a pick's when it is needed (default: by their number)",
    )
    parser.add_argument(
        "--for",
        dest="runtime",
        choices=("trtllm", "gguf"),
        help="also write the language model by itself: trtllm as trtllm-build and vLLM take it, in language_model/; "
        f"gguf as llama.cpp takes it, in {LANGUAGE_GGUF} (default: neither)",
    )
    parser.add_argument(
        "--gguf-type",
        choices=GGUF_TYPES,
        help=f"of the weights for --for gguf (default: {GGUF_TYPE})",
    )
    parser.add_argument(
        "--without-decoder",
        dest="decoder",
        action="store_false",
        help="vision, selection and embeddings alone: the language model is a GGUF file, a server's or an engine's",
    )
    parser.add_argument(
        "--max-pixels",
        type=_field("max_pixels", int),
        metavar="PIXELS",
        help="largest image, for families that take any size (default: the checkpoint's own limit)",
    )
    parser.add_argument(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="a chat template in Jinja (default: the checkpoint's)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub id (default: main)")
    parser.add_argument(
        "--verify",
        choices=VERIFY,
        default=Options.verify,
        help="compare text and answers with PyTorch, or the decoder by layers, without most likely tokens (default: by "
        "layers if memory is short)",
    )
    parser.add_argument("--force", action="store_true", help="replace the bundle at OUT")
    parser.set_defaults(run=run_export)


def run_export(arguments: argparse.Namespace) -> int:
    """Export; returns 0, or 1 with a table on stderr if a graph misses parity. Raises `ResPruneError`."""
    require_python("export", (3, 11))
    require_packages("export", NEEDED, 'install with: pip install "resprune[export]"')
    require_packages("export", *POSIX)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from resprune.exporter.checkpoint.checkpoint import require_model
    from resprune.exporter.transaction import require_free

    options = _options(arguments).check()
    require_free(arguments.out, force=arguments.force)
    require_model(arguments.model, revision=arguments.revision)
    from resprune.exporter.export import export
    from resprune.exporter.verify.difference import ParityError

    try:
        export(arguments.model, arguments.out, options, report=_print_line)
    except ParityError as error:
        print(f"resprune: {error}", file=sys.stderr)
        return 1
    return 0


def _print_line(line: str) -> None:
    """Print a line, and above the progress bar if there is one."""
    from tqdm import tqdm

    with tqdm.external_write_mode():
        print(printable(line), flush=True)  # names of the checkpoint's files may stand in it


def _budget(text: str) -> dict[str, Any]:
    """The field of `Options` that -k fills: `k`, or `share`, which is 1 for all."""
    try:
        budget = Budget.parse(text)
    except ResPruneError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return {"k": budget.k} if budget.k is not None else {"share": budget.share or 1.0}


def _options(arguments: argparse.Namespace) -> Options:
    """Those options that are fields, and what the others come to."""
    names = {field.name for field in fields(Options)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    dtype, optimize = _precision(arguments.preset, arguments.dtype, arguments.optimize, arguments.decoder)
    given |= {
        **arguments.tokens,
        "dtype": dtype,
        "optimize": optimize,
        "language_checkpoint": arguments.runtime == "trtllm",
        "gguf": _gguf(arguments.runtime, arguments.gguf_type),
        "command": shlex.join(["resprune", *sys.argv[1:]]),
    }
    return Options(**given)


def _precision(
    preset: str | None, dtype: str | None, optimize: str | None, decoder: bool
) -> tuple[str, str | None]:
    """What `--dtype` and `--optimize` are: those given, or the preset's, which optimizes a decoder if there is one.

    `ResPruneError` for both.
    """
    if preset is None:
        return dtype or Options.dtype, optimize
    if dtype or optimize:
        raise ResPruneError(
            f"--preset {preset} says what --dtype and --optimize are; give the preset or those, not both"
        )
    return PRESETS[preset].dtype, PRESETS[preset].optimize if decoder else None


def _gguf(runtime: str | None, precision: str | None) -> str | None:
    """The precision of the GGUF file, None for no file; `ResPruneError` for a precision of none."""
    if precision is not None and runtime != "gguf":
        raise ResPruneError("--gguf-type is for --for gguf; give that as well, or leave the option out")
    return precision or GGUF_TYPE if runtime == "gguf" else None


def _field(name: str, kind: Callable[[str], Any] = str) -> Callable[[str], Any]:
    """An argument's type: a `kind` that the field of `Options` takes."""

    def read(text: str) -> Any:
        try:
            return taken(name, kind(text))
        except ResPruneError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    read.__name__ = kind.__name__  # for argparse's "invalid float value"
    return read
